"""Finished blocks of a reconstruction with weights in files: an interrupted one resumes after them, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from saap.models.structure.cut import cut_bundles
from saap.models.walk.backend import Backend
from saap.models.walk.finished import read_finished, write_finished
from saap.models.walk.offload import OffloadedWeights, offloaded
from saap.models.walk.spill import FileTensors, Tensors

KEEP, ERRORS, WRITTEN = "keep/", "errors/", "written"


class FinishedReconstruction(NamedTuple):
    """Blocks that are done, the streams after them, and what a Reconstruction says of them."""

    blocks: int
    streams: list[Tensors]
    keep: dict[str, tuple[int, ...]]
    errors: dict[str, float]


@dataclass(frozen=True, slots=True)
class ReconstructionRecord:
    """Record of the finished blocks in a folder.

    folder: also of the changed weights. digest: of all that decides the result. on_resume: called when a reconstruction
    resumes.
    """

    backend: Backend
    weights: OffloadedWeights
    folder: Path
    digest: str
    on_resume: Callable[[], None]

    @classmethod
    def of(cls, backend: Backend, digest: str) -> ReconstructionRecord | None:
        """The record of a reconstruction; None if it is not to be resumed, or cannot be."""
        spill, weights = backend.spill, offloaded(backend.model)
        if not digest or weights is None or weights.folder is None or backend.processes.count > 1:
            return None
        if spill is None or spill.folder is None or spill.resumed is None:
            return None
        return cls(backend, weights, spill.folder, digest, spill.resumed)

    def write(
        self, blocks: int, streams: Sequence[Tensors], keep: Mapping[str, Sequence[int]], errors: Mapping[str, float]
    ) -> None:
        """Write the weights of the block that was finished last, then the record."""
        self.weights.offload()
        state = {f"{KEEP}{name}": np.array(units, dtype=np.float64) for name, units in keep.items()}
        state |= {f"{ERRORS}{path}": np.array([error]) for path, error in errors.items()}
        parts = map(self.weights.part_of, self.backend.graph.blocks[:blocks])
        state[WRITTEN] = np.array([layer for layer, part in enumerate(parts) if part.written], dtype=np.float64)
        write_finished(self.folder, self.digest, blocks, streams, state)

    def read(self) -> FinishedReconstruction | None:
        """What an interrupted run has finished, of which the model gets the weights; None without a record.

        Raises StaleInputError if it is damaged.
        """
        found = read_finished(self.folder, self.digest)
        if found is None:
            return None
        self.on_resume()
        streams: list[Tensors] = [FileTensors(self.folder, one) for one in found.streams]
        state = found.state
        keep = {name.removeprefix(KEEP): units for name, units in state.items() if name.startswith(KEEP)}
        errors = {name.removeprefix(ERRORS): float(one[0]) for name, one in state.items() if name.startswith(ERRORS)}
        finished = FinishedReconstruction(
            found.steps, streams, {name: tuple(map(int, units)) for name, units in keep.items()}, errors
        )
        model, graph = self.backend.model, self.backend.graph
        for layer in map(int, state[WRITTEN]):
            cut_bundles(model, [group for group in graph.in_block(layer) if group.name in keep], finished.keep)
            self.weights.read_written(graph.blocks[layer])
        return finished
