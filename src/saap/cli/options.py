"""Options that several commands share, each with its one help text."""

from __future__ import annotations

from typing import Annotated

import typer

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model repository ships.")]
DenseRevision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of the dense model. [default: as MODEL's manifest says]")
]
DenseTrustRemoteCode = Annotated[
    bool, typer.Option("--dense-trust-remote-code", help="Run code that the dense model's repository ships.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print no progress.")]
Runtime = Annotated[
    str | None, typer.Option(help="Where speed is measured: transformers or llama.cpp. [default: transformers]")
]
SpeedQuantization = Annotated[
    str | None,
    typer.Option("--quantization", help="Of the weights in llama.cpp, as `saap export` names them. [default: f16]"),
]
Bos = Annotated[
    bool,
    typer.Option(
        "--bos/--no-bos", help="Begin each window of text with the tokenizer's BOS token, if it puts one before texts."
    ),
]
RoundedTasks = Annotated[
    bool,
    typer.Option("--rounded-tasks", help="Round products to bfloat16 while tasks are scored, which can be quicker."),
]
