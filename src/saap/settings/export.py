"""Settings of `saap export`."""

from functools import partial
from typing import Annotated

from saap.settings.prune import GgufType
from saap.settings.registry import ExportFormat
from saap.settings.setting import Flag, Settings

format_flag = partial(Flag, panel="Format")


class ExportRequest(Settings):
    """Settings of an export: format, and for GGUF the type of the weights and whether llama.cpp checks the file."""

    format: Annotated[ExportFormat, format_flag(f"{ExportFormat.summaries()}.")] = ExportFormat.GGUF
    quantization: Annotated[GgufType, format_flag("Type of the weights in GGUF.")] = GgufType.F16
    verify: Annotated[
        bool,
        format_flag(
            "GGUF: compare the file in llama.cpp with transformers. MLX: check the folder with mlx-lm, if installed."
        ),
    ] = True
