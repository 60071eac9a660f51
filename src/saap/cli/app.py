"""The command line: thin; each command reads its flags, calls the pipeline and prints. Heavy imports are inside."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saap._version import __version__
from saap.cli.compare import compare
from saap.cli.evaluate import evaluate
from saap.cli.export import export
from saap.cli.generate import generate
from saap.cli.options import AsJson, Bos, Device, Quiet, Revision, Runtime, SpeedQuantization, TrustRemoteCode
from saap.cli.processes import leave, one_of_several
from saap.cli.recover import recover
from saap.cli.report import report
from saap.cli.run import run
from saap.cli.speed_options import chosen_runtime
from saap.core.errors import SaapError

if TYPE_CHECKING:
    from saap.pipeline.prune.run import RunOptions
    from saap.settings.prune import PruneConfig

app = typer.Typer(
    name="saap",
    help="Structured pruning of language models: a checkpoint in, a smaller one that opens everywhere out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder, .gguf file, or `smollm2`.")]


INTERRUPTED = 130

# The base of all complaints about the command line itself; typer does not export it under a name of its own.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Structured pruning of language models: a checkpoint in, a smaller one that opens everywhere out."""


@app.command()
def prune(
    model: Model,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to write. [required unless --dry-run]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR if it exists.")] = False,
    work_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where finished stages are kept. [default: OUT.saap-work]")
    ] = None,
    keep_work: Annotated[bool, typer.Option("--keep-work", help="Keep the stage files after success.")] = False,
    pruning_ratio: Annotated[
        str | None,
        typer.Option(
            metavar="R[,R...]",
            help="Fraction of the decoder blocks' parameters to remove; several share one estimation.",
        ),
    ] = None,
    target_params: Annotated[
        str | None, typer.Option(metavar="N", help="Parameters of the whole model that may stay, e.g. 100M.")
    ] = None,
    target_size: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Bytes of the weights as written, e.g. 200MB.")
    ] = None,
    target_speedup: Annotated[
        float | None, typer.Option(metavar="X", help="Decoding (batch 1) this many times as fast, e.g. 1.3.")
    ] = None,
    runtime: Runtime = None,
    quantization: SpeedQuantization = None,
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="A plan.json to carry out, edited or not.")] = None,
    method: Annotated[
        str, typer.Option(help="saap, or a baseline: random, magnitude, llm-pruner-element2, wanda-sp, flap, ...")
    ] = "saap",
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Text to calibrate on, repeatable: .txt, .jsonl, a bundled name or a data set. [default: mixed]",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples for the scores.")] = 50,
    sample_length: Annotated[int, typer.Option(help="Tokens of each calibration sample.")] = 128,
    refit_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens for the restoration. [default: set by --effort]")
    ] = None,
    bos: Bos = True,
    layout: Annotated[
        str, typer.Option(help="adaptive: each layer its own sizes; uniform: equal sizes, opens as the stock class.")
    ] = "adaptive",
    roles: Annotated[
        str, typer.Option(help="What may leave, some of ffn,attention,query,expert,block,hidden.")
    ] = "ffn,attention",
    skip_layers: Annotated[
        str, typer.Option(help="Blocks at the ends to leave whole: auto, or e.g. first:4,last:2.")
    ] = "auto",
    align: Annotated[int, typer.Option(help="Kept channels are a multiple of this.")] = 32,
    strategy: Annotated[
        str, typer.Option(help="adaptive, uniform, importance, volatility-z or volatility-cv.")
    ] = "adaptive",
    importance: Annotated[
        str, typer.Option(help="Score of a unit: fused, vector, element1, element2 or mixed.")
    ] = "fused",
    fusion_scope: Annotated[
        str, typer.Option(help="Who shares the fusion's uncertainties: global, role, layer or layer-role.")
    ] = "layer-role",
    aggregation: Annotated[str, typer.Option(help="How a unit's members combine: sum, max, prod or last.")] = "sum",
    restore: Annotated[
        bool | None,
        typer.Option(
            "--restore/--no-restore", help="Refit the consumers, or cut only. [default: restore, baselines not]"
        ),
    ] = None,
    effort: Annotated[str, typer.Option(help="fast, default or best: time for search and restoration.")] = "default",
    recover_on: Annotated[
        list[str] | None,
        typer.Option("--recover", metavar="NAME|FILE", help="Then tune the result on this data, as `saap recover`."),
    ] = None,
    recover_minutes: Annotated[float | None, typer.Option(help="Minutes of that tuning. [default: 20]")] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    device: Device = "auto",
    max_memory: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Most that may be resident, e.g. 6GB; blocks are read when needed for it."),
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(help="Blocks over several devices: auto, balanced or sequential."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the written weights: auto, float32, float16 or bfloat16.")] = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Stop before the estimation; say what would be done.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prune MODEL: discover its structures, estimate their importance, search, cut, restore, check, write.

    Several processes (torchrun --nproc-per-node N -m saap prune ...) share the text; each holds the whole model.
    """
    from saap.cli.parsing import choice, parse_bytes, parse_count, parse_ratios, parse_roles, parse_skip_layers
    from saap.core.errors import ConfigurationError
    from saap.core.records import Layout
    from saap.settings.prune import Aggregation, Effort, FusionScope, PruneConfig
    from saap.settings.registry import Importance, Method, Strategy

    if out is None and not dry_run:
        raise ConfigurationError("--out is missing", "Name the folder to write with --out DIR, or use --dry-run")
    if recover_minutes is not None and not recover_on:
        raise ConfigurationError("--recover-minutes tunes nothing", "Name the data with --recover NAME|FILE")
    asked = target_speedup is not None
    measured_in, gguf_type = chosen_runtime(runtime, quantization, flag="--target-speedup", given=asked)
    chosen = choice("--method", method, Method)
    config = PruneConfig(
        pruning_ratios=parse_ratios(pruning_ratio) if pruning_ratio is not None else (),
        target_parameters=parse_count("--target-params", target_params) if target_params is not None else None,
        target_bytes=parse_bytes("--target-size", target_size) if target_size is not None else None,
        target_speedup=target_speedup,
        runtime=measured_in,
        gguf_type=gguf_type,
        plan=plan,
        calibration=tuple(calibration) if calibration else ("mixed",),
        samples=samples,
        sample_length=sample_length,
        refit_tokens=refit_tokens,
        bos=bos,
        layout=choice("--layout", layout, Layout),
        roles=parse_roles(roles),
        skip_layers=parse_skip_layers(skip_layers),
        align=align,
        strategy=choice("--strategy", strategy, Strategy),
        importance=choice("--importance", importance, Importance),
        fusion_scope=choice("--fusion-scope", fusion_scope, FusionScope),
        aggregation=choice("--aggregation", aggregation, Aggregation),
        restore=chosen is Method.SAAP if restore is None else restore,
        method=chosen,
        effort=choice("--effort", effort, Effort),
        seed=seed,
    )
    from saap.pipeline.prune.run import RunOptions

    options = RunOptions(
        out=out, overwrite=overwrite, work_dir=work_dir, keep_work=keep_work, device=device, dtype=dtype,
        revision=revision, trust_remote_code=trust_remote_code, device_map=device_map,
        max_memory=parse_bytes("--max-memory", max_memory) if max_memory is not None else None,
    )  # fmt: skip
    if recover_on and not dry_run:
        _run_all_stages(model, config, options, (recover_on, recover_minutes), as_json=as_json, quiet=quiet)
        return
    _run_prune(model, config, options, dry_run=dry_run, as_json=as_json, quiet=quiet)


def _run_all_stages(
    model: str, config: PruneConfig, options: RunOptions, tuning: tuple[list[str], float | None], *,
    as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    from saap.cli.show.output import make_reporter, print_all_stages
    from saap.pipeline.prune.with_recovery import prune_and_recover
    from saap.settings.recover import RecoverConfig

    recovery = RecoverConfig(data=tuple(tuning[0]), max_minutes=tuning[1], bos=config.bos)
    with make_reporter(quiet=quiet, to_stderr=as_json) as reporter:
        results = prune_and_recover(model, config, recovery, options, reporter)
    if as_json:
        reports = [{"pruned": pruned.as_dict(), "recovered": tuned.as_dict()} for pruned, tuned in results]
        print(json.dumps(reports[0] if len(reports) == 1 else {"results": reports}, indent=1))
    elif not quiet:
        print_all_stages(results)


def _run_prune(
    model: str, config: PruneConfig, options: RunOptions, *, dry_run: bool, as_json: bool, quiet: bool
) -> None:
    from saap.cli.show.output import make_reporter, print_preview, print_results
    from saap.pipeline.prune.run import preview, run_prune

    with make_reporter(quiet=quiet, to_stderr=as_json) as reporter:
        if dry_run:
            shown = preview(model, config, options, reporter)
            print(json.dumps(shown, indent=1)) if as_json else print_preview(shown)
            return
        results = run_prune(model, config, options, reporter)
    if as_json:
        reports = [result.report.as_dict() for result in results]
        print(json.dumps(reports[0] if len(reports) == 1 else {"results": reports}, indent=1))
    elif not quiet:
        print_results(results)


@app.command()
def inspect(
    model: Model,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Show the coupled structures of MODEL: per role the groups, their units, members and parameters."""
    from saap.cli.show.output import print_structures
    from saap.pipeline.prune.run import inspect_model

    shown = inspect_model(model, revision=revision, trust_remote_code=trust_remote_code)
    print(json.dumps(shown, indent=1)) if as_json else print_structures(shown)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")] = Path("demo/smollm2-small"),
    effort: Annotated[str, typer.Option(help="fast, default or best.")] = "fast",
) -> None:
    """Prune a small real model (SmolLM2-135M from its Python wheel) by 20 % and show what came out."""
    from saap.cli.parsing import choice
    from saap.pipeline.prune.run import RunOptions
    from saap.settings.prune import Effort, PruneConfig

    config = PruneConfig(pruning_ratios=(0.2,), effort=choice("--effort", effort, Effort))
    print(f"$ saap prune smollm2 --pruning-ratio 0.2 --effort {effort} --out {out} --overwrite", flush=True)
    _run_prune("smollm2", config, RunOptions(out=out, overwrite=True), dry_run=False, as_json=False, quiet=False)


app.command()(export)
app.command()(generate)
app.command()(recover)
app.command("eval")(evaluate)
app.command()(compare)
app.command()(report)
app.command()(run)


def main() -> None:
    """Entry point. Exit codes: 0 done, 2 input that the user can mend, 130 interrupted."""
    try:
        with one_of_several(sys.argv[1:]):
            code = app(standalone_mode=False)
    except SaapError as error:
        leave(2, f"error: {error}")
    except _USAGE_ERROR as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "saap"
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        leave(2, f"error: {message.rstrip('.')}. See `{command} --help`.")
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:  # some versions of typer turn Ctrl-C into this code themselves
        leave(INTERRUPTED, "interrupted: finished stages are kept; the same command goes on from there.")
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
