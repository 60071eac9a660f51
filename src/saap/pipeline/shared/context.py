"""What the stages of a run share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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


@dataclass(frozen=True, slots=True)
class Run:
    """A run after its preparation: everything that can be refused has been checked.

    processes: that carry it out. The first one writes the stage files, and the others read them. measurements: what
    baselines have measured of the dense model so far, where several share it.
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

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.loaded.model.parameters()).device

    @property
    def spill(self) -> Spill | None:
        """Where activations are kept: in the work folder if the weights are in their files, None for memory."""
        return Spill(self.work.file("spill")) if offloaded(self.loaded.model) is not None else None

    @property
    def backend(self) -> Backend:
        """The dense model, and how the stages run it."""
        advance = self.meter.reporter.advance
        return Backend(self.loaded.model, self.graph, self.processes, self.spill, progress=advance)
