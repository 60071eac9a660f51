"""Statistics of scores over samples, and the observer that collects them in a walk."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Self

import numpy as np
from torch import Tensor

from saap.core.errors import NonFiniteLossError
from saap.core.records import CoupledGroup, FloatArray, GroupScores
from saap.models.walk.observer import Batch, Observer
from saap.models.walk.processes import Processes


@dataclass(frozen=True, slots=True)
class Moments:
    """Statistics over samples of two scores of a group's units.

    mean: (2, units). products: (2, 2, units), sums of products of deviations from the mean.
    """

    samples: int
    mean: FloatArray
    products: FloatArray

    @classmethod
    def of(cls, vector: FloatArray, element: FloatArray) -> Self:
        """Moments of a single sample."""
        return cls(1, np.stack([vector, element]), np.zeros((2, 2, len(vector))))

    @property
    def scores(self) -> GroupScores:
        """The statistics as a record."""
        (vector, element), ((vector_m2, comoment), (_, element_m2)) = self.mean, self.products
        return GroupScores(
            vector=vector, vector_m2=vector_m2, element=element, element_m2=element_m2, comoment=comoment
        )


def merge(one: Moments, other: Moments) -> Moments:
    """Moments of the union of two sets of samples; if the second has one sample, this is Welford's update.

    Source: Chan, Golub and LeVeque 1983, also for co-moments.
    """
    samples, difference = one.samples + other.samples, other.mean - one.mean
    share = other.samples / samples
    between = difference[:, None] * difference * (one.samples * share)
    return Moments(samples, one.mean + difference * share, one.products + other.products + between)


class ScoreObserver(Observer):
    """Observer that collects the losses and the statistics of scores; `observe` of a subclass calls `add`.

    one_by_one: whether a micro-batch must be one sample. backward: whether it observes a backward pass; without one
    there are no losses.
    """

    one_by_one = False
    backward = True

    def __init__(self, groups: Iterable[CoupledGroup]) -> None:
        self._names = [group.name for group in groups]
        self._moments: dict[str, Moments] = {}
        self._losses: list[FloatArray] = []

    def add(self, name: str, batch: Batch, element: Tensor, vector: Tensor | None = None) -> None:
        """Add the scores of a group's units for the samples of a micro-batch.

        element, vector: (samples, units), not negative; a single score is used for both.
        Raises NonFiniteLossError.
        """
        each = [(element if one is None else one).cpu().double().numpy() for one in (vector, element)]
        for offset, sample in enumerate(zip(*each, strict=True)):
            if not np.isfinite(sample).all():
                raise NonFiniteLossError(
                    f"The importance of {name} for calibration sample {batch.first + offset} is not a finite number",
                    "Compute in float32 (--dtype float32) and check the text of that sample",
                )
            found = Moments.of(*sample)
            self._moments[name] = merge(self._moments[name], found) if name in self._moments else found

    def state(self) -> Mapping[str, FloatArray]:
        """Losses, and the moments of the groups that were scored so far."""
        found = {"losses": np.concatenate([np.empty(0), *self._losses])}
        for name, one in self._moments.items():
            found |= {f"{name}/samples": np.full(1, float(one.samples)), f"{name}/mean": one.mean}
            found[f"{name}/products"] = one.products
        return found

    def restore(self, state: Mapping[str, FloatArray]) -> None:
        """Continue from the losses and moments of another one."""
        self._losses = [state["losses"]]
        scored = [name for name in self._names if f"{name}/samples" in state]
        self._moments = {
            name: Moments(int(state[f"{name}/samples"][0]), state[f"{name}/mean"], state[f"{name}/products"])
            for name in scored
        }

    def observe_loss(self, batch: Batch, losses: Tensor) -> None:
        """Keep the losses."""
        self._losses.append(losses.cpu().double().numpy())

    def merge(self, processes: Processes) -> None:
        """Merge the moments of all processes; a process without samples has none."""
        found = processes.gather((self._moments, self._losses))
        self._losses = [losses for _, parts in found for losses in parts]
        every = [moments for moments, _ in found if moments]
        scored = [name for name in self._names if every and name in every[0]]
        self._moments = {name: reduce(merge, [one[name] for one in every]) for name in scored}

    def result(self) -> tuple[FloatArray, dict[str, GroupScores]]:
        """Losses of all samples, and the statistics of every group that was scored."""
        return np.concatenate([np.empty(0), *self._losses]), {name: one.scores for name, one in self._moments.items()}
