"""`saap eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from saap.cli.options import (
    AsJson,
    Bos,
    DenseRevision,
    DenseTrustRemoteCode,
    Device,
    Quiet,
    Revision,
    RoundedTasks,
    Runtime,
    SpeedQuantization,
    TrustRemoteCode,
)
from saap.cli.speed_options import chosen_runtime


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf file or `smollm2`.")],
    perplexity: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|FILE", help="Text to read, repeatable: wikitext2, ptb, c4, bundled, or a file."),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens of each window that perplexity is measured in.")] = 512,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window's start to the next's. [default: the window]")
    ] = None,
    bos: Bos = True,
    max_tokens: Annotated[int | None, typer.Option(help="Read only the first tokens of each text.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="TASK[,TASK...]", help="Zero-shot tasks, or `paper` for the seven of the SAAP paper."),
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with TASK.SPLIT.jsonl files, instead of the hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N questions of each task.")] = None,
    rounded_tasks: RoundedTasks = False,
    generation: Annotated[
        bool, typer.Option("--generation", help="Let the model write, and measure what it writes and knows.")
    ] = False,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Prompts in place of the bundled ones: .txt, or .jsonl with prompt, answer."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to write for each prompt.")] = 128,
    chat: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Conversations (.jsonl with messages) to measure answers of.")
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Measure this one beside it. [generation: the one it was made from]"),
    ] = None,
    dense_revision: DenseRevision = None,
    dense_trust_remote_code: DenseTrustRemoteCode = False,
    speed: Annotated[
        bool, typer.Option("--speed", help="Tokens per second of reading and of writing (batch 1).")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Measure speed beside this one. [default: the one it was made from]"),
    ] = None,
    runtime: Runtime = None,
    quantization: SpeedQuantization = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the report as JSON.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampled text.")] = 0,
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure MODEL: perplexity, zero-shot tasks, generation, conversations, speed."""
    from saap.cli.show.evaluate import print_eval
    from saap.cli.show.output import make_reporter
    from saap.core.errors import ConfigurationError
    from saap.pipeline.evaluate.run import evaluate_model, write_report
    from saap.pipeline.shared.inputs import RunOptions
    from saap.settings.measure import EvalRequest, SpeedSettings

    measured_in, gguf_type = chosen_runtime(runtime, quantization, flag="--speed", given=speed)
    named = () if tasks is None else tuple(name.strip() for name in tasks.split(",") if name.strip())
    request = EvalRequest(
        texts=tuple(perplexity or ()), window=window, stride=stride, bos=bos, max_tokens=max_tokens,
        tasks=named, task_data=task_data, limit=limit, rounded=rounded_tasks,
        prompts=prompts or ("bundled" if generation else None), generated_tokens=tokens, chat=chat, dense=dense,
        dense_revision=dense_revision, dense_trust_remote_code=dense_trust_remote_code,
        seed=seed, against=against,
        speed=SpeedSettings(runtime=measured_in, gguf_type=gguf_type) if speed else None,
    )  # fmt: skip
    if request.names_nothing:
        raise ConfigurationError(
            "nothing to measure was named",
            "Give some of --perplexity, --tasks, --generation, --prompts, --chat, --speed",
        )
    options = RunOptions(device=device, revision=revision, trust_remote_code=trust_remote_code)
    with make_reporter(quiet=quiet, to_stderr=as_json) as reporter:
        report = evaluate_model(model, request, options, reporter).as_dict()
    if out is not None:
        write_report(out, report)
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    elif not quiet:
        print_eval(report)
