"""Packages that an export needs, checked before a model is read or made."""

from __future__ import annotations

from saap.core.errors import ExportError
from saap.models.loading.llama_cpp import llama_cpp_is_installed
from saap.settings.export import ExportRequest
from saap.settings.registry import ExportFormat


def check_packages(request: ExportRequest) -> None:
    """Raise ConfigurationError or ExportError if a package that the export needs is not installed."""
    request.format.check()
    if request.format is ExportFormat.GGUF:
        _check_llama_cpp(request)


def _check_llama_cpp(request: ExportRequest) -> None:
    needs = "Checking the file" if request.verify else ""
    if request.quantization.made_by_llama_cpp:
        needs = f"The type {request.quantization}"
    if needs and not llama_cpp_is_installed():
        remedy = "Run pip install 'saap[gguf]', or use --no-verify"
        if request.quantization.made_by_llama_cpp:
            remedy = "Run pip install 'saap[gguf]', or use --quantization q8_0 --no-verify"
        raise ExportError(f"{needs} needs the package llama-cpp-py-sync", remedy)
