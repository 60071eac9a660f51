"""Settings of `saap export`."""

from functools import partial
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, model_validator

from saap.settings.prune import GgufType
from saap.settings.registry import ExportFormat
from saap.settings.setting import AtLeast1, Flag, Settings

format_flag = partial(Flag, panel="Format")


def _known_format(given: Any) -> Any:
    """Formats that are no longer written, by what replaces them."""
    if given == "decilm":
        remedy = "Run `vllm serve MODEL --model-impl transformers --trust-remote-code`"
        raise ValueError("is not written any more, as vLLM opens the folder itself", remedy)
    return given


class ExportRequest(Settings):
    """Settings of an export: format; for GGUF the type of the weights, and how llama.cpp checks the file.

    imatrix: only for types that llama.cpp's own quantiser makes.
    """

    format: Annotated[ExportFormat, BeforeValidator(_known_format), format_flag(f"{ExportFormat.summaries()}.")] = (
        ExportFormat.GGUF
    )
    quantization: Annotated[GgufType, format_flag("Type of the weights in GGUF.")] = GgufType.F16
    imatrix: Annotated[bool, format_flag("Weigh quantisation errors by activations on bundled text.")] = True
    verify: Annotated[
        bool,
        format_flag(
            "GGUF: compare the file in llama.cpp with transformers. MLX: check the folder with mlx-lm, if installed."
        ),
    ] = True
    check_tokens: Annotated[AtLeast1, format_flag("GGUF: tokens of that comparison, also of its perplexity.")] = 512

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.imatrix and "imatrix" in self.model_fields_set and not self.quantization.made_by_llama_cpp:
            kinds = ", ".join(kind for kind in GgufType if kind.made_by_llama_cpp)
            raise ValueError(
                f"--imatrix changes nothing of {self.quantization}", f"Use one of {kinds}, or leave it out"
            )
        return self
