"""Shared state of the stages of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from saap.baselines.baseline import Measurements
from saap.core.manifest import VocabularyRecord
from saap.core.records import ModelGraph
from saap.core.vocabulary import VocabularyMap
from saap.models.walk.backend import Backend
from saap.models.walk.offload import offloaded
from saap.models.walk.processes import Processes
from saap.models.walk.spill import Spill
from saap.pipeline.shared.inputs import LoadedModel, RunOptions
from saap.pipeline.shared.meter import Meter
from saap.pipeline.shared.outcome import Behaviour
from saap.pipeline.shared.targets import Target
from saap.pipeline.shared.tokens import TokenSets
from saap.pipeline.shared.work import WorkFolder
from saap.settings.prune import PruneConfig
from saap.structure_search.plan import SearchSpace

if TYPE_CHECKING:
    from saap.export.expert_folder import FolderExperts
    from saap.export.gguf.removal import GgufExperts


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyCut:
    """What was removed of the vocabulary before all other stages.

    map: the kept ids. dense: figures of the dense model. dense_parameters: its parameters. kinds: bundled kinds of text
    in the languages whose tokens stay.
    """

    map: VocabularyMap
    record: VocabularyRecord
    dense: Behaviour
    dense_parameters: int
    kinds: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Run:
    """A prepared run: everything that can be checked early has been checked.

    processes: of the run; the first one writes the stage files, and the others read them. measurements: the baselines'
    measurements of the dense model so far, if several methods or results share them. experts: of the model's files, if
    the result is these files without some of them. vocabulary: what was removed of it; `loaded` and `graph` are of the
    model after that.
    """

    config: PruneConfig
    options: RunOptions
    loaded: LoadedModel
    graph: ModelGraph
    space: SearchSpace
    tokens: TokenSets
    work: WorkFolder
    meter: Meter
    processes: Processes = field(default_factory=Processes)
    targets: Sequence[Target] = ()
    measurements: Measurements | None = None
    experts: GgufExperts | FolderExperts | None = None
    vocabulary: VocabularyCut | None = None

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense model, with its whole vocabulary."""
        return self.graph.parameters if self.vocabulary is None else self.vocabulary.dense_parameters

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.loaded.model.parameters()).device

    @property
    def spill(self) -> Spill | None:
        """Storage of activations: in the work folder if the weights are offloaded to files, None for memory."""
        return Spill(self.work.file("spill")) if offloaded(self.loaded.model) is not None else None

    @property
    def backend(self) -> Backend:
        """The backend of the dense model."""
        advance = self.meter.reporter.advance
        return Backend(self.loaded.model, self.graph, self.processes, self.spill, progress=advance)
