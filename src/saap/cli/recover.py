"""`saap recover`."""

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
    TrustRemoteCode,
)


def recover(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder that `saap prune` has written, or any other model.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Text to learn from, repeatable: .txt, .jsonl with text, instructions or chats. [default: mixed]",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR if it exists.")] = False,
    work_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the training's state is kept. [default: OUT.saap-work]")
    ] = None,
    keep_work: Annotated[bool, typer.Option("--keep-work", help="Keep the state after success.")] = False,
    tuning: Annotated[
        str, typer.Option(help="groupwise: adapters on quantised weights; lora: plain LoRA in full precision.")
    ] = "groupwise",
    bits: Annotated[int, typer.Option(help="Bits of a weight: 2, 3, 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale and a zero point: 16 to 128.")] = 32,
    error_feedback: Annotated[
        bool, typer.Option("--error-feedback", help="Quantise by GPTQ: later columns make up for earlier ones.")
    ] = False,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    alpha: Annotated[float, typer.Option(help="The adapters' product is scaled by alpha / rank.")] = 16.0,
    no_scales: Annotated[bool, typer.Option("--no-scales", help="Learn zero points only, not the scales.")] = False,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The dense model to learn from. [default: what MODEL was pruned from]"),
    ] = None,
    dense_revision: DenseRevision = None,
    dense_trust_remote_code: DenseTrustRemoteCode = False,
    distillation: Annotated[
        float | None,
        typer.Option(
            help="Share of the divergence from the teacher in the loss, 0 to 1. [default: 1, without a teacher 0]"
        ),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a block of text; longer conversations are cut.")] = 512,
    bos: Bos = True,
    batch: Annotated[int, typer.Option(help="Sequences of a step, over all processes.")] = 1,
    micro_batch: Annotated[int, typer.Option(help="Sequences that are computed at once.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 1e-3,
    warm_up: Annotated[float, typer.Option(help="Share of the way on which the learning rate rises.")] = 0.05,
    clip: Annotated[float, typer.Option(help="Longer gradients are shortened to this norm.")] = 1.0,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens.")] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop after so many minutes of training. [default: 20 without a limit]")
    ] = None,
    validate_every: Annotated[int, typer.Option(help="Steps between two validations; the state is saved then.")] = 60,
    validation_samples: Annotated[int, typer.Option(help="Sequences that are held back for validation.")] = 8,
    patience: Annotated[int, typer.Option(help="Stop after so many validations without a new best; 0 never.")] = 5,
    no_gradient_checkpointing: Annotated[
        bool, typer.Option("--no-gradient-checkpointing", help="Keep all activations: quicker, more memory.")
    ] = False,
    exact_products: Annotated[
        bool, typer.Option("--exact-products", help="Train in full float32 on the CPU too: slower.")
    ] = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="Split frozen weights over the processes (FSDP): slower, less memory.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="Of the written weights: auto, float32, float16 or bfloat16.")] = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Tune MODEL on text with quantised weights in little memory, and write it as a plain checkpoint.

    Several processes (torchrun --nproc-per-node N -m saap recover ...) share each batch. Each holds the whole quantised
    model and its teacher; with --shard each holds a part of them.
    """
    from saap.cli.parsing import choice
    from saap.settings.recover import RecoverConfig, Tuning

    config = RecoverConfig(
        data=tuple(data) if data else ("mixed",), tuning=choice("--tuning", tuning, Tuning), bits=bits,
        group_size=group_size, error_feedback=error_feedback, rank=rank, alpha=alpha, scales=not no_scales,
        teacher=teacher, dense_revision=dense_revision, dense_trust_remote_code=dense_trust_remote_code,
        distillation=distillation, length=length, bos=bos, batch=batch,
        micro_batch=micro_batch, learning_rate=learning_rate,
        warm_up=warm_up, clip=clip, max_steps=max_steps, max_tokens=max_tokens, max_minutes=max_minutes,
        validate_every=validate_every, validation_samples=validation_samples, patience=patience,
        gradient_checkpointing=not no_gradient_checkpointing,
        exact_products=exact_products, shard=shard, seed=seed,
    )  # fmt: skip
    from saap.cli.show.output import make_reporter, print_recovery
    from saap.pipeline.recover.run import run_recover
    from saap.pipeline.shared.inputs import RunOptions

    options = RunOptions(
        out=out, overwrite=overwrite, work_dir=work_dir, keep_work=keep_work, device=device, dtype=dtype,
        revision=revision, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    with make_reporter(quiet=quiet, to_stderr=as_json) as reporter:
        result = run_recover(model, config, options, reporter)
    if as_json:
        print(json.dumps(result.report.as_dict(), indent=1))
    elif not quiet:
        print_recovery(result.report)
