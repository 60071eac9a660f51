"""Settings of `saap export`."""

from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator

from saap.settings.prune import GgufType
from saap.settings.registry import ExportFormat
from saap.settings.setting import Flag, Settings

format_flag = partial(Flag, panel="Format")


def _known_format(given: Any) -> Any:
    """Formats that are no longer written, by what replaces them."""
    if given == "decilm":
        remedy = "Run `vllm serve MODEL --model-impl transformers --trust-remote-code`"
        raise ValueError("is not written any more, as vLLM opens the folder itself", remedy)
    return given


class ExportRequest(Settings):
    """Settings of an export: format, and for GGUF the type of the weights and whether llama.cpp checks the file."""

    format: Annotated[ExportFormat, BeforeValidator(_known_format), format_flag(f"{ExportFormat.summaries()}.")] = (
        ExportFormat.GGUF
    )
    quantization: Annotated[GgufType, format_flag("Type of the weights in GGUF.")] = GgufType.F16
    verify: Annotated[bool, format_flag("Compare the file in llama.cpp with transformers.")] = True
