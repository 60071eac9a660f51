"""What is chosen by name and can be added to: export formats, and programs that speed is measured in.

Each is one line. The code behind a name is imported when it is used, so that names and help cost nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
from enum import StrEnum
from typing import Any, Self

from saap.core.errors import ConfigurationError


class Registered(StrEnum):
    """A name, the code behind it ("package.module.attribute"), what it is in a few words, and what it needs.

    needs: packages of the extra `saap[gguf]`, by the names that pip knows. suffix: of the file that is written, '' for
    a folder.
    """

    code: str
    summary: str
    needs: tuple[str, ...]
    suffix: str

    def __new__(
        cls, name: str, code: str = "", summary: str = "", needs: tuple[str, ...] = (), suffix: str = ""
    ) -> Self:
        """Make a member whose value is its name."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.code, member.summary, member.needs, member.suffix = code, summary, needs, suffix
        return member

    def check(self) -> None:
        """Raise ConfigurationError if a package that it needs is not installed; nothing is imported."""
        for package in self.needs:
            if importlib.util.find_spec(package.replace("-", "_")) is None:
                raise ConfigurationError(f"{self} needs the package {package}", "Run pip install 'saap[gguf]'")

    def load(self) -> Any:
        """The code behind the name, imported. Raises ConfigurationError as `check` does."""
        self.check()
        module, _, attribute = self.code.rpartition(".")
        return getattr(importlib.import_module(module), attribute)

    @classmethod
    def summaries(cls) -> str:
        """All names, with what they are: the help of a flag that takes one."""
        return "; ".join(f"{member}, {member.summary}" for member in cls)


class ExportFormat(Registered):
    """What a model can be written as. code: a function like `saap.export.decilm.write`."""

    GGUF = "gguf", "saap.export.gguf.write.write", "for llama.cpp and Ollama", ("gguf",), ".gguf"
    DECILM = "decilm", "saap.export.decilm.write", "a folder for vLLM (not tried there)"


class RuntimeName(Registered):
    """Which program computes the model where its speed is measured. code: a class like `TransformersRuntime`."""

    TRANSFORMERS = "transformers", "saap.pipeline.runtimes.transformers.TransformersRuntime", "PyTorch"
    LLAMA_CPP = (
        "llama.cpp",
        "saap.pipeline.runtimes.llama_cpp.LlamaCppRuntime",
        "with weights of a GGUF type",
        ("gguf", "llama-cpp-py-sync"),
    )
