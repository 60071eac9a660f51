"""Terminal output of `saap prune`. Only drawing, no computation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from saap.cli.show.output import BAR_WIDTH, console_for_tables, print_answers, print_end, threads
from saap.cli.show.recover import print_recovery

if TYPE_CHECKING:
    from saap.core.manifest import VocabularyRecord
    from saap.pipeline.prune.result import PruneReport
    from saap.pipeline.recover.result import RecoverReport


def print_preview(shown: Mapping[str, Any]) -> None:
    """Draw the result of a dry run."""
    console = console_for_tables()
    console.print(f"model: {escape(str(shown['model']))}, {shown['parameters']:,} parameters")
    if shown["vocabulary"] is not None:
        tokens = shown["vocabulary"]["tokens"]
        console.print(f"vocabulary: {tokens['after']:,} of {tokens['before']:,} tokens would stay")
    reachable = f"reachable with {', '.join(shown['roles'])}"
    speedup = shown["settings"]["target_speedup"]
    for target in shown["targets"]:
        what = f"at least {target['removal']:,} parameters are removed"
        if speedup is not None:
            what = f"decoding {speedup:g} times as fast in {shown['settings']['runtime']}"
        console.print(f"target {escape(target['name'])}: {what}; {reachable}")
    for name, tokens in shown["tokens"].items():
        console.print(f"tokens for {name}: {tokens:,}")
    table = Table("stage on this machine", "about s", "memory, GB", "disk, MB")
    forecast = shown["forecast"]
    for stage in forecast["stages"]:
        seconds = "?" if stage["seconds"] is None else f"{stage['seconds']:.0f}"
        disk = f"{stage['disk_bytes'] / 1e6:,.0f}" if stage["disk_bytes"] else ""
        table.add_row(escape(stage["name"]), seconds, f"{stage['peak_resident_bytes'] / 1e9:.1f}", disk)
    peak = f"{forecast['peak_resident_bytes'] / 1e9:.1f}"
    table.add_row("all", f"{forecast['seconds']:.0f}", peak, f"{forecast['disk_bytes'] / 1e6:,.0f}")
    console.print(table)
    if shown["recover"]:
        console.print(f"then it would be tuned on {escape(', '.join(shown['recover']))}; not part of the forecast.")
    console.print("nothing was written.")


def print_results(reports: Sequence[PruneReport]) -> None:
    """Draw the summary of each result."""
    console = console_for_tables()
    for report in reports:
        console.print(f"\n[bold]{escape(report.path or 'pruned model')}[/bold]")
        table = Table("", "dense", "pruned", "ratio")
        for label, dense, pruned in (
            ("parameters", report.parameters_dense, report.parameters),
            ("in decoder blocks", report.block_parameters_dense, report.block_parameters),
            (f"bytes ({report.dtype})", report.bytes_dense, report.bytes),
        ):
            table.add_row(label, f"{dense:,}", f"{pruned:,}", f"{pruned / dense:.3f}")
        values = (f"{report.perplexity_dense:.2f}", f"{report.perplexity:.2f}", f"{report.perplexity_ratio:.3f}")
        table.add_row(f"perplexity ({escape(report.evaluation_text)})", *values)
        console.print(table)
        if report.kinds:
            console.print(_kinds_table(report))
        if report.vocabulary is not None:
            console.print(_vocabulary_table(report.vocabulary))
        if report.speed is not None:
            speed = report.speed
            console.print(
                f"speed of decoding: {speed['reached']:.2f} of the dense model's, requested {speed['asked']:g}, "
                f"predicted {speed['predicted']:.2f}; {speed['dense_tokens_per_second']:.1f} -> "
                f"{speed['tokens_per_second']:.1f} tokens/s in {speed['runtime']} ({speed['weights']}, "
                f"{threads(speed['threads'])})"
            )
        structure = report.structure if report.block_parameters < report.block_parameters_dense else ()
        if structure:
            console.print("kept units per layer:")
        for row in structure:
            cells = []
            for role, kept, units in row.parts:
                filled = round(BAR_WIDTH * kept / units) if units else 0
                cells.append(f"{role} {'█' * filled}{'░' * (BAR_WIDTH - filled)} {kept:>5}/{units}")
            console.print(f"  {row.name:>6}  " + "   ".join(cells))
        print_answers(console, report.prompt, {"dense": report.answer_dense, "pruned": report.answer})
        for finding in report.findings:
            console.print(f"[yellow]look here:[/yellow] {escape(finding)}")
        print_end(console, report)


def _kinds_table(report: PruneReport) -> Table:
    """Draw the perplexity before and after by kind of text."""
    vocabulary = report.vocabulary
    title = "perplexity by kind of text" + (", per token of the dense model" if vocabulary is not None else "")
    more = ("bits/byte, dense", "pruned", "bytes/token, dense", "pruned") if vocabulary is not None else ()
    table = Table("kind of text", "dense", "pruned", "ratio", *more, title=title, title_justify="left")
    for kind in report.kinds:
        cells = [f"{kind.before:.2f}", f"{kind.after:.2f}", f"{kind.ratio:.2f}"]
        if vocabulary is not None:
            bits = (kind.bits_per_byte, kind.bits_per_byte_after)
            cells += ["" if value is None else f"{value:.3f}" for value in bits]
            cells += [f"{value:.2f}" for value in vocabulary.texts[kind.text].bytes_per_token]
        table.add_row(kind.text, *cells)
    return table


def _vocabulary_table(vocabulary: VocabularyRecord) -> Table:
    """Draw the tokens before and after by script."""
    title = f"tokens by script; those of {', '.join(vocabulary.languages)} stay"
    table = Table("script", "dense", "pruned", title=title, title_justify="left")
    for script, change in vocabulary.largest_scripts().items():
        table.add_row(escape(script), f"{change.before:,}", f"{change.after:,}")
    table.add_section()
    table.add_row("all", f"{vocabulary.tokens.before:,}", f"{vocabulary.tokens.after:,}")
    return table


def print_all_stages(results: Sequence[tuple[PruneReport, RecoverReport]]) -> None:
    """Draw the summary of each result that was pruned and then tuned."""
    for pruned, tuned in results:
        print_results([pruned.model_copy(update={"path": None, "load_lines": ()})])
        print_recovery(tuned)
