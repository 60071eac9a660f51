"""Shared state of the stages of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from saap.baselines.baseline import Measurements
from saap.core.records import ModelGraph
from saap.models.walk.backend import Backend
from saap.models.walk.offload import offloaded
from saap.models.walk.processes import Processes
from saap.models.walk.spill import Spill
from saap.pipeline.shared.inputs import LoadedModel, RunOptions
from saap.pipeline.shared.meter import Meter
from saap.pipeline.shared.targets import Target
from saap.pipeline.shared.tokens import TokenSets
from saap.pipeline.shared.work import WorkFolder
from saap.settings.prune import PruneConfig
from saap.structure_search.plan import SearchSpace

if TYPE_CHECKING:
    from saap.export.expert_folder import FolderExperts
    from saap.export.gguf.removal import GgufExperts


@dataclass(frozen=True, slots=True)
class Run:
    """A prepared run: everything that can be checked early has been checked.

    processes: of the run; the first one writes the stage files, and the others read them. measurements: the baselines'
    measurements of the dense model so far, if several methods share them. experts: of the model's files, if the result
    is these files without some of them.
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
