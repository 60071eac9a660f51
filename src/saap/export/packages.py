"""Packages that an export needs, checked before a model is read or made."""

from __future__ import annotations

from saap.core.errors import ExportError
from saap.models.loading.llama_cpp import llama_cpp_is_installed
from saap.settings.export import ExportRequest
from saap.settings.registry import ExportFormat


def check_packages(request: ExportRequest) -> None:
    """Raise ConfigurationError or ExportError if a package that the export needs is not installed."""
    request.format.check()
    by_llama_cpp = request.quantization.made_by_llama_cpp
    opened = request.format is ExportFormat.GGUF and (request.verify or by_llama_cpp)
    if opened and not llama_cpp_is_installed():
        needs, flags = "Checking the file", "--no-verify"
        if by_llama_cpp:
            needs, flags = f"The type {request.quantization}", "--quantization q8_0 --no-verify"
        raise ExportError(
            f"{needs} needs the package llama-cpp-py-sync", f"Run pip install 'saap[gguf]', or use {flags}"
        )
