"""Where and how a run works: the settings that commands share, and what each prints."""

from functools import partial
from pathlib import Path
from typing import Annotated

from saap.settings.setting import Bytes, Flag, Settings

OUTPUT = "Output"
result_flag = partial(Flag, panel="Result")
out_flag = partial(result_flag, short="-o", aliases=("out",))
model_flag = partial(Flag, panel="Model and device")
output_flag = partial(Flag, panel=OUTPUT)


class RunOptions(Settings):
    """Where and how a run works; nothing here changes the result except `dtype`.

    max_memory: bytes that the run may take where it computes: of an accelerator (None: what is free there), or resident
    of the process (None: any number). Where the weights therefore stay in their files, the search measures fewer
    candidates, and the model writes no text of its own to be calibrated on.
    """

    out: Annotated[Path | None, out_flag("Folder to write.", name="output_dir", metavar="DIR")] = None
    overwrite: Annotated[bool, result_flag("Replace the folder if it exists.")] = False
    work_dir: Annotated[
        Path | None, result_flag("Where finished stages are kept.", metavar="DIR", default="OUTPUT_DIR.saap-work")
    ] = None
    keep_work: Annotated[bool, result_flag("Keep the stage files after success.")] = False
    device: Annotated[str, model_flag("auto, cpu, cuda, cuda:N or mps.", metavar="DEVICE")] = "auto"
    dtype: Annotated[
        str,
        model_flag(
            "auto, float32, float16 or bfloat16: of the written weights, or to compute in if none are.", metavar="DTYPE"
        ),
    ] = "auto"
    max_memory: Annotated[
        Bytes | None,
        model_flag("Most that may be resident, e.g. 6GB; blocks are read when needed for it.", metavar="BYTES"),
    ] = None
    device_map: Annotated[str | None, model_flag("Blocks over several devices: auto, balanced or sequential.")] = None
    revision: Annotated[str | None, model_flag("Branch, tag or commit of a hub model.", metavar="REF")] = None
    trust_remote_code: Annotated[bool, model_flag("Run code that the model repository ships.")] = False


READS = ("device", "revision", "trust_remote_code")
"""What a command takes that opens a model."""
OPENS = (*READS, "dtype")
"""What it takes where the type to compute in, or to write, can be chosen too."""


class Display(Settings):
    """What a command prints."""

    as_json: Annotated[bool, output_flag("Print exactly one JSON object on stdout.", name="json")] = False
    quiet: Annotated[bool, output_flag("Print no progress.")] = False
