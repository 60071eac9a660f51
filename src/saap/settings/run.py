"""Settings shared by commands: output, devices, memory, and printing."""

from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from saap.settings.setting import Bytes, Flag, Settings

OUTPUT = "Output"
result_flag = partial(Flag, panel="Result")
out_flag = partial(result_flag, short="-o", aliases=("out",))
model_flag = partial(Flag, panel="Model and device")
output_flag = partial(Flag, panel=OUTPUT)


def with_name(path: Path | None) -> Path | None:
    """The path, absolute where its last part is no name (`.` or `..`): files next to it derive theirs from that."""
    if path is None or path.name not in ("", ".."):
        return path
    absolute = path.resolve()
    if not absolute.name:
        raise ValueError("is the root of a file system", "Choose a folder in it")
    return absolute


class RunOptions(Settings):
    """Execution options of a run; only `dtype` changes the result.

    max_memory: limit in bytes on the compute device: memory of an accelerator (None: its free memory), or resident
    memory of the process (None: unlimited). If the weights therefore stay in their files, the search evaluates fewer
    candidates.
    """

    out: Annotated[
        Path | None,
        AfterValidator(with_name),
        out_flag("Folder to write.", name="output_dir", metavar="DIR"),
    ] = None
    overwrite: Annotated[bool, result_flag("Replace the result if it exists.")] = False
    work_dir: Annotated[
        Path | None, AfterValidator(with_name),
        result_flag("Folder of finished stages.", metavar="DIR", default="OUTPUT_DIR.saap-work"),
    ] = None  # fmt: skip
    keep_work: Annotated[bool, result_flag("Keep the stage files after success.")] = False
    device: Annotated[str, model_flag("auto, cpu, cuda, cuda:N or mps.", metavar="DEVICE")] = "auto"
    dtype: Annotated[
        str,
        model_flag("auto, float32, float16 or bfloat16: of the written weights; else to compute in.", metavar="DTYPE"),
    ] = "auto"
    max_memory: Annotated[
        Bytes | None, model_flag("Memory limit, e.g. 6GB; blocks are offloaded to meet it.", metavar="BYTES")
    ] = None
    device_map: Annotated[str | None, model_flag("Split blocks over devices: auto, balanced or sequential.")] = None
    revision: Annotated[str | None, model_flag("Branch, tag or commit of a hub model.", metavar="REF")] = None
    trust_remote_code: Annotated[bool, model_flag("Run code that the model repository ships.")] = False


READS = ("device", "revision", "trust_remote_code")
"""Options of commands that open a model."""
OPENS = (*READS, "dtype")
"""The same, for commands that also have a type to compute in or to write."""


class Display(Settings):
    """Printing options of a command."""

    as_json: Annotated[bool, output_flag("Print exactly one JSON object on stdout.", name="json")] = False
    quiet: Annotated[bool, output_flag("Print no progress, and the result only with --json.")] = False
