"""What a run gives back: the pruned model, its plan and the figures that were measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn

from saap.core.manifest import KindChange, Opening, StageRecord, VocabularyRecord
from saap.core.records import Candidate, CoupledGroup, ModelGraph, Role, StructurePlan
from saap.models.loading.pretrained import trainable
from saap.models.structure.keep_index import KeepIndex
from saap.models.walk.offload import offloaded


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStructure:
    """Kept units of one layer. parts: (role, kept, units) for each of its groups."""

    name: str
    parts: tuple[tuple[str, int, int], ...]


class PruneReport(BaseModel):
    """Figures of one result.

    Bytes are of the weights in `dtype`, dense and pruned alike. Answers are greedy continuations of `prompt`. kinds:
    the perplexity on each kind of text. speed: the fields of SpeedRecord where a speed-up was requested. vocabulary: if
    tokens were removed; perplexities are per token of the dense model. opened: in the programs of `--check`.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    path: str | None
    target: str
    layout: str
    strategy: str
    seed: int
    pruning_ratio: float
    parameters_dense: int
    parameters: int
    block_parameters_dense: int
    block_parameters: int
    bytes_dense: int
    bytes: int
    dtype: str
    evaluation_text: str
    evaluation_tokens: int
    perplexity_dense: float
    perplexity: float
    kinds: tuple[KindChange, ...] = ()
    prompt: str
    answer_dense: str
    answer: str
    structure: tuple[LayerStructure, ...]
    trail: tuple[Candidate, ...]
    refit_errors: dict[str, float]
    distillation: tuple[float, float] | None = None
    findings: tuple[str, ...]
    stages: tuple[StageRecord, ...]
    load_lines: tuple[str, ...]
    speed: dict[str, Any] | None = None
    vocabulary: VocabularyRecord | None = None
    opened: tuple[Opening, ...] = ()

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of the pruned model over that of the dense one."""
        return self.perplexity / self.perplexity_dense

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        return {**self.model_dump(), "perplexity_ratio": self.perplexity_ratio}


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """A pruned model. path: its folder, None if it was not written. opener: gives the model, on first access."""

    plan: StructurePlan
    report: PruneReport
    path: Path | None
    opener: Callable[[], nn.Module] = field(repr=False)

    @cached_property
    def model(self) -> nn.Module:
        """The pruned model. Of several results in folders, those before the last are read from them by this.

        It can be trained, unless its weights are in files.
        """
        model = self.opener()
        return model if offloaded(model) is not None else trainable(model)


def structure_of(graph: ModelGraph, plan: StructurePlan) -> tuple[LayerStructure, ...]:
    """Kept units of every layer, and of the whole model's groups, in a form that can be drawn."""
    index = KeepIndex.of(graph, plan.keep)

    def kept_units(group: CoupledGroup) -> int:
        """Units that stay; those of a removed expert leave with it."""
        stacks = {(member.tensor, member.part) for member in group.members if member.part is not None}
        stays = all(part in index.axis(tensor, 0).kept() for tensor, part in stacks)
        return len(plan.kept(group)) if stays else 0

    rows = []
    for layer in range(-1, len(graph.blocks)):
        groups = graph.in_block(layer)
        if not groups or (layer < 0 and not any(group.name in plan.keep for group in groups)):
            continue
        dropped = layer in plan.dropped_blocks
        parts: list[tuple[str, int, int]] = []
        for role in Role:
            of_role = [group for group in groups if group.role is role]
            if of_role:
                kept = 0 if dropped else sum(map(kept_units, of_role))
                parts.append((str(role), kept, sum(group.units for group in of_role)))
        rows.append(LayerStructure(name="all" if layer < 0 else str(layer), parts=tuple(parts)))
    return tuple(rows)
