"""`saap export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, model_validator

from saap.core.errors import ConfigurationError
from saap.settings.export import ExportRequest
from saap.settings.run import Display, RunOptions, out_flag, result_flag, with_name
from saap.settings.setting import Only, Settings


class ExportTarget(Settings):
    """Destination of an exported model."""

    out: Annotated[
        Path | None,
        AfterValidator(with_name),
        out_flag("File or folder to write. [required unless --push]", name="output", metavar="PATH"),
    ] = None
    push: Annotated[str | None, result_flag("Upload the folder MODEL to the hub unchanged.", metavar="OWNER/NAME")] = (
        None
    )
    private: Annotated[bool, result_flag("With --push: create a private repository.")] = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.private and self.push is None:
            raise ValueError("--private is only of an upload", "Add --push OWNER/NAME, or leave it out")
        return self


def export(
    model: Annotated[str, "Folder written by saap, or any model that `saap prune` accepts."],
    target: ExportTarget,
    request: ExportRequest,
    options: Annotated[RunOptions, Only(("overwrite", "revision"))],
    display: Display,
) -> None:
    """Write MODEL in the format of another program, and check the file there."""
    from huggingface_hub import RepoUrl

    from saap.cli.show.output import make_reporter, show
    from saap.pipeline.export.run import export_model, opening_lines, push

    if target.push is not None and (given := request.flags_given() + options.flags_given("overwrite", "revision")):
        raise ConfigurationError(
            f"--push uploads the folder MODEL unchanged, without {' and '.join(given)}",
            "Write with -o first, then --push the folder",
        )
    with make_reporter(display) as reporter:
        if target.push is not None and target.out is None:
            address = push(model, target.push, private=target.private, reporter=reporter)
            opened = (f"  {line}" for line in opening_lines(model, RepoUrl(address).repo_id))
            lines = (f"uploaded {model} to {address}", "open it with:", *opened)
            return show(display, {"address": address}, lambda: print(*lines, sep="\n"))
        if target.out is None or target.push is not None:
            raise ConfigurationError(
                "One of --output and --push is needed", "Write with -o first, then --push the folder"
            )
        done = export_model(
            model, target.out, request, overwrite=options.overwrite, revision=options.revision, reporter=reporter
        )
    return show(display, done.as_dict(), lambda: print(*done.notes, sep="\n"))
