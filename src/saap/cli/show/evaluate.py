"""Output of `saap eval`: tables of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from saap.cli.show.output import console_for_tables, one_line, threads
from saap.reporting.tables import MEASURES

BY_QUARTER = (
    ("dense_perplexity_by_quarter", "  by quarter", 1), ("repetition_by_quarter", "repeated by quarter, %", 100),
)  # fmt: skip


def print_eval(report: Mapping[str, Any]) -> None:
    """Tables of all measurements, compared with the dense model if that was measured too."""
    console = console_for_tables()
    dense = report["dense"]
    console.print(f"[bold]{escape(report['model'])}[/bold]: {report['parameters']:,} parameters")
    if report["perplexity"]:
        headings = ("bits/byte", *(("dense", "ratio", "bits/byte, dense") if dense else ()))
        table = Table("text", "tokens", "window", "perplexity", *headings)
        for name, found in report["perplexity"].items():
            cells = [f"{found['tokens']:,}", str(found["window"]), _number(found["value"])]
            cells.append(_number(found["bits_per_byte"]))
            if dense:
                base = dense["perplexity"][name]
                comparable = base["text_digest"] == found["text_digest"]  # else their tokens are not the same
                ratio = _ratio(found["value"], base["value"]) if comparable else "-"
                cells += [_number(base["value"]), ratio, _number(base["bits_per_byte"])]
            table.add_row(escape(name), *cells)
        console.print(table)
    if report["tasks"]:
        headings, keys = (("dense acc", "dense acc_norm") if dense else ()), ("acc", "acc_norm")
        table, both = Table("task", "questions", *keys, "chance", *headings), [report, *([dense] if dense else [])]
        for name, found in report["tasks"].items():
            cells = [_accuracy(one["tasks"][name], key) for one in both for key in keys]
            table.add_row(escape(name), str(found["questions"]), *cells[:2], f"{found['chance']:.3f}", *cells[2:])
        cells = [f"{one['tasks_mean'][key]:.3f}" for one in both for key in keys]
        table.add_section()
        table.add_row("mean", "", *cells[:2], "", *cells[2:])
        console.print(table)
    if report["chat"]:
        chat = report["chat"]
        versus = f", dense {_number(dense['chat']['value'])}" if dense else ""
        console.print(f"answers in {chat['turns']} turns of conversations: perplexity {_number(chat['value'])}{versus}")
    if report["speed"]:
        _print_speed(console, report["speed"])
    if report["generation"]:
        _print_generation(console, report["generation"])


def _print_speed(console: Any, found: Mapping[str, Any]) -> None:
    """Tokens per second, and the speed-up over the other model."""
    table = Table(
        f"{found['runtime']}, {found['weights']}, {threads(found['threads'])}", "prefill, tokens/s", "decode, tokens/s",
        "bytes read / token",
    )  # fmt: skip
    for one in (found["against"], found["model"]):
        if one is not None:
            speeds = (f"{one['prefill']:.1f}", f"{one['decode']:.1f}", f"{one['bytes_per_token']:,}")
            table.add_row(escape(one["model"]), *speeds)
    if found["against"] is not None:
        table.add_section()
        quotients = (found[key] for key in ("prefill_speedup", "decode_speedup", "bytes_ratio"))
        table.add_row("speed-up", *(f"{one:.3f}" for one in quotients))
    console.print(table)
    console.print(
        f"{found['prompt_tokens']} prompt, {found['new_tokens']} new tokens, batch 1; medians of {found['rounds']} "
        "interleaved rounds; speed-up: median of the ratios in each round"
    )


def _print_generation(console: Any, found: Mapping[str, Any]) -> None:
    dense = found["dense_figures"] or {}
    table = Table("generated text", *found["figures"], *(f"dense, {mode}" for mode in dense))
    columns = [*found["figures"].values(), *dense.values()]
    for key, label, factor in (*MEASURES, *BY_QUARTER):
        values = [(column[key] or ()) if key.endswith("quarter") else [column[key]] for column in columns]
        table.add_row(label, *(" ".join(_number(one, factor) for one in cell) for cell in values))
    if columns:
        console.print(table)
    if found["token_agreement"] is not None:
        console.print(f"agreement with the dense model's greedy tokens: {found['token_agreement']:.1%}")
    if found["cloze"]:
        versus = f", dense {found['dense_cloze']['accuracy']:.1%}" if found["dense_cloze"] else ""
        console.print(f"facts: {found['cloze']['accuracy']:.1%} of {found['cloze']['prompts']}{versus}")
    for prompt, texts in list(found["samples"].get("greedy", {}).items())[:3]:
        console.print(f"prompt: {one_line(prompt)}")
        for name, text in texts.items():
            console.print(f"  {name}: {one_line(text[:300])}")


def _number(value: float | None, factor: float = 1) -> str:
    if value is None:
        return "-"
    value *= factor
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.3f}" if value and base else "-"


def _accuracy(found: Mapping[str, Any], key: str) -> str:
    return "-" if found[key] is None else f"{found[key]:.3f} ± {found[key + '_stderr']:.3f}"
