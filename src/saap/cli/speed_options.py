"""Flags about speed that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saap.settings.prune import GgufType
    from saap.settings.registry import RuntimeName


def chosen_runtime(
    runtime: str | None, quantization: str | None, *, flag: str, given: bool
) -> tuple[RuntimeName, GgufType]:
    """Where speed is measured, and the type of the weights in llama.cpp.

    flag: the one that asks for a speed, given: whether it does. Raises ConfigurationError.
    """
    from saap.cli.parsing import choice
    from saap.core.errors import ConfigurationError
    from saap.settings.prune import GgufType
    from saap.settings.registry import RuntimeName

    if not given and (runtime or quantization):
        raise ConfigurationError("--runtime and --quantization measure nothing by themselves", f"Add {flag}")
    chosen = RuntimeName.TRANSFORMERS if runtime is None else choice("--runtime", runtime, RuntimeName)
    if quantization is not None and chosen is not RuntimeName.LLAMA_CPP:
        raise ConfigurationError(
            f"--quantization is of files for llama.cpp, not of {chosen}", "Add --runtime llama.cpp, or leave it out"
        )
    return chosen, GgufType.F16 if quantization is None else choice("--quantization", quantization, GgufType)
