"""`saap export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from saap.cli.flags import Argument
from saap.core.errors import ConfigurationError
from saap.settings.measure import ExportFormat, ExportRequest
from saap.settings.run import OPENS, Display, RunOptions, result_flag
from saap.settings.setting import Only, Settings

if TYPE_CHECKING:
    from saap.pipeline.export.run import GgufExport


class ExportTarget(Settings):
    """Where an exported model goes."""

    out: Annotated[
        Path | None,
        result_flag(
            "File or folder to write. [required unless --push]",
            name="output",
            short="-o",
            aliases=("out",),
            metavar="PATH",
        ),
    ] = None
    push: Annotated[str | None, result_flag("Upload the folder MODEL to the hub as it is.", metavar="OWNER/NAME")] = (
        None
    )
    private: Annotated[bool, result_flag("With --push: a repository that only you see.")] = False


def export(
    model: Annotated[str, Argument("Folder that saap wrote, or any model that `saap prune` takes.")],
    target: ExportTarget,
    request: ExportRequest,
    options: Annotated[RunOptions, Only(("overwrite", *OPENS))],
    display: Display,
) -> None:
    """Write MODEL in the format of another program, and check it there."""
    from saap.cli.show.output import make_reporter
    from saap.pipeline.export.run import export_decilm, export_gguf, opening_lines, push

    with make_reporter(quiet=display.quiet, to_stderr=display.as_json) as reporter:
        if target.push is not None and target.out is None:
            address = push(model, target.push, private=target.private, reporter=reporter)
            if display.as_json:
                print(json.dumps({"address": address}))
            elif not display.quiet:
                print(f"uploaded {model} to {address}", "open it with:", sep="\n")
                print(*(f"  {line}" for line in opening_lines(model, target.push)), sep="\n")
            return
        if target.out is None or target.push is not None:
            raise ConfigurationError(
                "One of --output and --push is needed", "Write with -o first, then --push the folder"
            )
        if request.format is ExportFormat.DECILM:
            path = export_decilm(model, target.out, overwrite=options.overwrite, revision=options.revision)
            shown = json.dumps({"path": str(path)})
            print(shown if display.as_json else f"vllm serve {path} --trust-remote-code   # not tried")
            return
        done = export_gguf(
            model, target.out, quantization=request.quantization, overwrite=options.overwrite, verify=request.verify,
            revision=options.revision, reporter=reporter,
        )  # fmt: skip
    if display.as_json:
        print(json.dumps(done.as_dict(), indent=1))
    elif not display.quiet:
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
