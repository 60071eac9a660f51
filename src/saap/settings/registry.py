"""Registries of everything selected by name: importances, strategies, methods, export formats, runtimes.

Each entry is one line. Its code is imported on use, so names and help are fast.
"""

from __future__ import annotations

import importlib
import importlib.util
from enum import StrEnum
from typing import Any, Self

from saap.core.errors import ConfigurationError


class Registered(StrEnum):
    """A name, the path of its code ("package.module.attribute"), a summary, and its requirements.

    needs: packages by their names on PyPI. suffix: of the written file, '' for a folder. extra: of saap with the
    packages, '' if there is none.
    """

    code: str
    summary: str
    needs: tuple[str, ...]
    suffix: str
    extra: str

    def __new__(
        cls,
        name: str,
        code: str = "",
        summary: str = "",
        needs: tuple[str, ...] = (),
        suffix: str = "",
        extra: str = "gguf",
    ) -> Self:
        """Create a member whose value is its name."""
        member = str.__new__(cls, name)
        member._value_ = name
        member.code, member.summary, member.needs, member.suffix, member.extra = code, summary, needs, suffix, extra
        return member

    def check(self) -> None:
        """Raise ConfigurationError if a required package is not installed; nothing is imported."""
        for package in self.needs:
            if importlib.util.find_spec(package.replace("-", "_")) is None:
                remedy = (
                    f"Run pip install 'saap[{self.extra}]'" if self.extra else f"Run saap where {package} is installed"
                )
                raise ConfigurationError(f"{self} needs the package {package}", remedy)

    def load(self) -> Any:
        """The code behind the name, imported. Raises ConfigurationError as `check` does."""
        self.check()
        module, _, attribute = self.code.rpartition(".")
        return getattr(importlib.import_module(module), attribute)

    @classmethod
    def summaries(cls) -> str:
        """All names with their summaries, for the help of a flag."""
        return "; ".join(f"{member}, {member.summary}" for member in cls)


class Importance(Registered):
    """Which score orders the units of a module: a `Scoring` of `saap.estimation.importance`."""

    TOKEN_FISHER = (
        "token-fisher",
        "saap.estimation.token_fisher.TOKEN_FISHER",
        "squared change of the loss, token by token (Fisher information)",
    )
    FUSED = "fused", "saap.estimation.fusion.FUSED", "vector-wise and element-wise, weighted by learned uncertainties"
    VECTOR = "vector", "saap.estimation.importance.VECTOR", "first order, signed over all weights of a unit"
    ELEMENT1 = "element1", "saap.estimation.importance.ELEMENT1", "first order, absolute over weights"
    ELEMENT2 = "element2", "saap.estimation.importance.ELEMENT2", "second order over weights (Fisher diagonal)"
    MIXED = "mixed", "saap.estimation.importance.MIXED", "both orders over weights, absolute"
    REAP = "reap", "saap.estimation.reap.REAP", "gate times output norm of an expert (role expert only)"
    RECONSTRUCTION = (
        "reconstruction",
        "saap.estimation.expert_reconstruction.RECONSTRUCTION",
        "what a layer loses without an expert after the best remix of the others (role expert only)",
    )
    FREQUENCY = "frequency", "saap.estimation.routing.FREQUENCY", "share of tokens of an expert (role expert only)"

    @property
    def of_experts(self) -> bool:
        """Whether it scores whole experts only."""
        return self in (Importance.REAP, Importance.RECONSTRUCTION, Importance.FREQUENCY)


class Strategy(Registered):
    """Strategy of the search, which allocates the pruned share to modules: from a `SearchProblem` to a `Proposal`."""

    ADAPTIVE = "adaptive", "saap.structure_search.strategies.adaptive", "equal shares, or what lowers the loss clearly"
    SECOND_ORDER = (
        "second-order",
        "saap.structure_search.strategies.adaptive",
        "the same after compensation, with second-order costs: for text like the calibration's",
    )
    IMPORTANCE = "importance", "saap.structure_search.strategies.importance", "one global ranking of all units"
    UNIFORM = "uniform", "saap.structure_search.strategies.uniform", "the same share from every module"
    STABILITY = "stability", "saap.structure_search.strategies.stability", "the least important of the unstable half"
    VOLATILITY_Z = "volatility-z", "saap.structure_search.strategies.volatility_z", "greatest standardised fluctuation"
    VOLATILITY_CV = "volatility-cv", "saap.structure_search.strategies.volatility_cv", "greatest relative volatility"

    @property
    def evaluates(self) -> bool:
        """Whether it evaluates candidates, and the reconstruction selects the units."""
        return self in (Strategy.ADAPTIVE, Strategy.SECOND_ORDER)


class Method(Registered):
    """Pruning method: SAAP, or a `Baseline` of `saap.baselines.baseline` with its own scores and rules."""

    SAAP = "saap", "saap.pipeline.prune.run.run_prune", "importance fusion, structure search and reconstruction"
    RANDOM = "random", "saap.baselines.weights.RANDOM", "random scores"
    MAGNITUDE = "magnitude", "saap.baselines.weights.MAGNITUDE", "squares of the weights"
    LLM_PRUNER_VECTOR = "llm-pruner-vector", "saap.baselines.llm_pruner.VECTOR", "LLM-Pruner, vector-wise"
    LLM_PRUNER_ELEMENT1 = "llm-pruner-element1", "saap.baselines.llm_pruner.ELEMENT1", "LLM-Pruner, first order"
    LLM_PRUNER_ELEMENT2 = "llm-pruner-element2", "saap.baselines.llm_pruner.ELEMENT2", "LLM-Pruner, second order"
    LLM_PRUNER_MIXED = "llm-pruner-mixed", "saap.baselines.llm_pruner.MIXED", "LLM-Pruner, both orders"
    WANDA_SP = "wanda-sp", "saap.baselines.activations.WANDA_SP", "Wanda summed over structures"
    FLAP = "flap", "saap.baselines.activations.FLAP", "fluctuation of inputs, with compensating biases"
    BLOCK_INFLUENCE = "block-influence", "saap.baselines.activations.BLOCK_INFLUENCE", "ShortGPT: whole blocks"


class ExportFormat(Registered):
    """Export formats. code: a function like `saap.export.gguf.write.write`."""

    GGUF = "gguf", "saap.export.gguf.write.write", "for llama.cpp and Ollama", ("gguf",), ".gguf"
    MLX = "mlx", "saap.export.mlx.write", "a folder for MLX-LM"


class RuntimeName(Registered):
    """Runtime of speed measurements. code: a class like `TransformersRuntime`."""

    TRANSFORMERS = "transformers", "saap.pipeline.runtimes.transformers.TransformersRuntime", "PyTorch"
    LLAMA_CPP = (
        "llama.cpp",
        "saap.pipeline.runtimes.llama_cpp.LlamaCppRuntime",
        "with weights of a GGUF type",
        ("gguf", "llama-cpp-py-sync"),
    )


class Consumer(Registered):
    """A program that a result is opened in. code: a function like `saap.export.consumers.transformers_code`."""

    TRANSFORMERS = "transformers", "saap.export.consumers.transformers_code", "as where saap is not installed"
    LLAMA_CPP = (
        "llama.cpp",
        "saap.export.consumers.llama_cpp_code",
        "exported as GGUF and compared",
        ("gguf", "llama-cpp-py-sync"),
    )
    VLLM = "vllm", "saap.export.consumers.vllm_code", "with its Transformers backend", ("vllm",), "", ""
    MLX = "mlx", "saap.export.consumers.mlx_code", "mlx-lm", ("mlx-lm",), "", ""
