"""`saap export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from saap.cli.options import AsJson, Quiet, Revision
from saap.settings.registry import ExportFormat


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder that saap wrote, or any model that `saap prune` takes.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="PATH", help="File or folder to write. [required unless --push]")
    ] = None,
    to: Annotated[str, typer.Option("--format", help=f"{ExportFormat.summaries()}.")] = "gguf",
    quantization: Annotated[
        str, typer.Option(help="Of the weights in GGUF: f32, f16, bf16, q8_0, q4_0 or q4_1.")
    ] = "f16",
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the file in llama.cpp with transformers.")
    ] = True,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the folder MODEL to the hub as it is.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: a repository that only you see.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace PATH if it exists.")] = False,
    revision: Revision = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write MODEL in the format of another program, and check it there."""
    from saap.cli.parsing import choice
    from saap.cli.show.output import make_reporter
    from saap.core.errors import ConfigurationError
    from saap.pipeline.export.run import export_model, opening_lines
    from saap.pipeline.export.run import push as push_to_hub
    from saap.settings.measure import ExportRequest
    from saap.settings.prune import GgufType

    if push is not None and out is None:
        with make_reporter(quiet=quiet, to_stderr=as_json) as reporter:
            address = push_to_hub(model, push, private=private, reporter=reporter)
        if as_json:
            print(json.dumps({"address": address}))
        elif not quiet:
            print(f"uploaded {model} to {address}", "open it with:", sep="\n")
            print(*(f"  {line}" for line in opening_lines(model, push)), sep="\n")
        return
    if out is None or push is not None:
        raise ConfigurationError("One of --out and --push is needed", "Write with --out first, then --push the folder")
    request = ExportRequest(
        format=choice("--format", to, ExportFormat), quantization=choice("--quantization", quantization, GgufType),
        verify=verify,
    )  # fmt: skip
    with make_reporter(quiet=quiet, to_stderr=as_json) as reporter:
        done = export_model(model, out, request, overwrite=overwrite, revision=revision, reporter=reporter)
    if as_json:
        print(json.dumps(done.as_dict(), indent=1))
    elif not quiet:
        print(*done.notes, sep="\n")
