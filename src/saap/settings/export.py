"""Settings of `saap export`."""

from enum import StrEnum
from functools import partial
from typing import Annotated, Self

from pydantic import model_validator

from saap.settings.registry import ExportFormat, RuntimeName
from saap.settings.setting import AtLeast1, Flag, Settings

format_flag = partial(Flag, panel="Format")
GGUF_TYPE = "Of the weights in llama.cpp."
_OF_GGUF = ("quantization", "imatrix", "check_tokens")
GGUF_BLOCK = 256
"""Weights of a row that share scales in the types that llama.cpp's own quantiser makes."""


class GgufType(StrEnum):
    """How the weights of a GGUF file are stored."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"
    Q4_1 = "q4_1"
    Q6_K = "q6_k"
    Q5_K_M = "q5_k_m"
    Q4_K_M = "q4_k_m"
    IQ4_XS = "iq4_xs"

    @property
    def made_by_llama_cpp(self) -> bool:
        """Whether llama.cpp's own quantiser writes the file, from one of type f16; its blocks are 256 wide."""
        return self in (GgufType.Q6_K, GgufType.Q5_K_M, GgufType.Q4_K_M, GgufType.IQ4_XS)


def check_gguf_type(gguf_type: GgufType, runtime: RuntimeName) -> None:
    """Refuse a type of GGUF weights for a runtime that reads none. Raises ValueError."""
    if gguf_type is not GgufType.F16 and runtime is not RuntimeName.LLAMA_CPP:
        problem = f"--gguf-type is of files for llama.cpp, not of {runtime}"
        raise ValueError(problem, "Add --runtime llama.cpp, or leave it out")


class ExportRequest(Settings):
    """Settings of an export: format; for GGUF the type of the weights, and how llama.cpp checks the file.

    imatrix: only for types that llama.cpp's own quantiser makes.
    """

    format: Annotated[ExportFormat, format_flag(f"{ExportFormat.summaries()}.")] = ExportFormat.GGUF
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
        if self.format is not ExportFormat.GGUF and (given := self.flags_given(*_OF_GGUF)):
            raise ValueError(
                f"{' and '.join(given)} can only be given for GGUF files, not for {self.format}",
                "Use --format gguf, or leave it out" if len(given) == 1 else "Use --format gguf, or leave them out",
            )
        if not self.verify and self.flags_given("check_tokens"):
            raise ValueError("--check-tokens changes nothing with --no-verify", "Leave out one of the two")
        if self.imatrix and "imatrix" in self.model_fields_set and not self.quantization.made_by_llama_cpp:
            kinds = ", ".join(kind for kind in GgufType if kind.made_by_llama_cpp)
            raise ValueError(
                f"--imatrix changes nothing of {self.quantization}", f"Use one of {kinds}, or leave it out"
            )
        return self
