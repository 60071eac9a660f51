"""`saap export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saap.cli.options import AsJson, Quiet, Revision

if TYPE_CHECKING:
    from saap.pipeline.export.run import GgufExport


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder that saap wrote, or any model that `saap prune` takes.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="PATH", help="File or folder to write. [required unless --push]")
    ] = None,
    to: Annotated[
        str,
        typer.Option("--format", help="gguf, for llama.cpp and Ollama; decilm, a folder for vLLM (not tried there)."),
    ] = "gguf",
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
    from saap.pipeline.export.run import export_decilm, export_gguf, opening_lines
    from saap.pipeline.export.run import push as push_to_hub
    from saap.settings.measure import ExportFormat
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
    if choice("--format", to, ExportFormat) is ExportFormat.DECILM:
        path = export_decilm(model, out, overwrite=overwrite, revision=revision)
        print(json.dumps({"path": str(path)}) if as_json else f"vllm serve {path} --trust-remote-code   # not tried")
        return
    kind = choice("--quantization", quantization, GgufType)
    with make_reporter(quiet=quiet, to_stderr=as_json) as reporter:
        done = export_gguf(
            model, out, quantization=kind, overwrite=overwrite, verify=verify, revision=revision, reporter=reporter
        )
    if as_json:
        print(json.dumps(done.as_dict(), indent=1))
    elif not quiet:
        _show(done)


def _show(done: GgufExport) -> None:
    print(
        f"{done.path}: {done.bytes / 1e6:,.1f} MB, {done.quantization}, architecture {done.architecture} of llama.cpp"
    )
    print(f"tokenizer from {done.tokenizer}")
    if done.packed_matrices:
        print(f"{done.packed_matrices} matrices hold the very integers and scales that `saap recover` has found")
    if done.not_packed is not None:
        print(f"look here: {done.not_packed}, which is no Q4_1, so the weights were quantised anew")
    agreement = done.agreement
    if agreement is None:
        print("not checked in llama.cpp")
    else:
        print(
            f"checked in llama.cpp: the same next token as transformers for {agreement.share:.2%} of "
            f"{agreement.tokens} tokens, divergence {agreement.divergence:.1e} nats"
        )
        if not done.same_tokens:
            print("look here: llama.cpp cuts the checked text into other tokens than the model's own tokenizer")
    print("run it with:")
    print(f"  llama-cli -m {done.path}")
    print(f"  ollama create {done.path.stem} -f {done.modelfile}")
