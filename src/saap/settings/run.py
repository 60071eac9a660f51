"""Where and how a run works: the settings that commands share, and what each prints."""

from pathlib import Path
from typing import Annotated

from saap.settings.setting import Bytes, Flag, Settings

RESULT, MODEL, OUTPUT = "Result", "Model and device", "Output"


class RunOptions(Settings):
    """Where and how a run works; nothing here changes the result except `dtype`.

    max_memory: bytes that the run may take where it computes: of an accelerator (None: what is free there), or resident
    of the process (None: any number). Where the weights therefore stay in their files, the search measures fewer
    candidates, and the model writes no text of its own to be calibrated on.
    """

    out: Annotated[
        Path | None,
        Flag(help="Folder to write.", panel=RESULT, name="output_dir", short="-o", aliases=("out",), metavar="DIR"),
    ] = None
    overwrite: Annotated[bool, Flag(help="Replace the folder if it exists.", panel=RESULT)] = False
    work_dir: Annotated[
        Path | None,
        Flag(help="Where finished stages are kept.", panel=RESULT, metavar="DIR", default="OUTPUT_DIR.saap-work"),
    ] = None
    keep_work: Annotated[bool, Flag(help="Keep the stage files after success.", panel=RESULT)] = False
    device: Annotated[str, Flag(help="auto, cpu, cuda, cuda:N or mps.", panel=MODEL, metavar="DEVICE")] = "auto"
    dtype: Annotated[
        str,
        Flag(
            help="auto, float32, float16 or bfloat16: of the written weights, or to compute in if none are.",
            panel=MODEL,
            metavar="DTYPE",
        ),
    ] = "auto"
    max_memory: Annotated[
        Bytes | None,
        Flag(
            help="Most that may be resident, e.g. 6GB; blocks are read when needed for it.",
            panel=MODEL, metavar="BYTES",
        ),
    ] = None  # fmt: skip
    device_map: Annotated[
        str | None, Flag(help="Blocks over several devices: auto, balanced or sequential.", panel=MODEL)
    ] = None
    revision: Annotated[str | None, Flag(help="Branch, tag or commit of a hub model.", panel=MODEL, metavar="REF")] = (
        None
    )
    trust_remote_code: Annotated[bool, Flag(help="Run code that the model repository ships.", panel=MODEL)] = False


OPENS = ("device", "dtype", "revision", "trust_remote_code")
"""What every command takes that opens a model."""


class Display(Settings):
    """What a command prints."""

    as_json: Annotated[bool, Flag(help="Print exactly one JSON object on stdout.", panel=OUTPUT, name="json")] = False
    quiet: Annotated[bool, Flag(help="Print no progress.", panel=OUTPUT)] = False
