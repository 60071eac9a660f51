"""LLM-Pruner's importances (Ma, Fang and Wang 2023, "LLM-Pruner: On the Structural Pruning of Large Language Models").

SAAP computes importances per sample and then averages them. LLM-Pruner uses the averaged gradient, so opposite
gradients of two samples cancel in the first-order terms. Deviation: both gradients come from one pass, one sample at a
time, instead of one pass each; the numbers are the same.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from saap.baselines.baseline import Baseline, along_axis, block_groups, score_units, scored_members
from saap.core.records import AxisSlice, CoupledGroup, FloatArray, ModelGraph
from saap.models.loading.precision import at_least_float32
from saap.models.walk.backend import Backend
from saap.models.walk.observer import Observation, Observer, Signal
from saap.models.walk.processes import Processes
from saap.models.walk.walk import walk

TERMS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "vectorize": lambda w, g, h: w * g,
    "param_first": lambda w, g, h: (w * g).abs(),
    "param_second": lambda w, g, h: w.square() * h,
    "param_mix": lambda w, g, h: (w * g - 0.5 * w.square() * h).abs(),
}
"""Terms of each element, by LLM-Pruner's names. w: weight, g: mean gradient, h: mean squared gradient."""


class AveragedGradients(Observer):
    """By tensor, float32: `mean`, the gradient of the mean loss; `square`, the mean over samples of its square.

    Covers the scored weights of all decoder blocks, at 8 bytes per weight. The loss of a sample is the mean over its
    predicted tokens; a micro-batch must be one sample. samples: total number.
    """

    def __init__(self, graph: ModelGraph, samples: int) -> None:
        tensors = {member.tensor for group in block_groups(graph) for member in scored_members(graph, group)}
        self.needs = dict.fromkeys(sorted(tensors), Signal.WEIGHT_GRADIENT)
        self._share = 1 / samples
        self.mean: dict[str, Tensor] = {}
        self.square: dict[str, Tensor] = {}

    def observe(self, seen: Observation) -> None:
        """Add one sample's gradient of one weight."""
        gradient = at_least_float32(seen.dw)  # small addends would be lost in the sums of a bfloat16 model
        if seen.site not in self.mean:
            self.mean[seen.site], self.square[seen.site] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        self.mean[seen.site].add_(gradient, alpha=self._share)
        self.square[seen.site].addcmul_(gradient, gradient, value=self._share)

    def merge(self, processes: Processes) -> None:
        """Sums over the samples of all processes."""
        self.mean = {name: processes.total(mean) for name, mean in self.mean.items()}
        self.square = {name: processes.total(square) for name, square in self.square.items()}


def gradients(backend: Backend, tokens: Tensor) -> AveragedGradients:
    """Averaged gradients over `tokens` (samples, length). Raises NonFiniteLossError."""
    found = AveragedGradients(backend.graph, len(tokens))
    walk(backend, tokens, [found], micro_batch=1)
    return found


def taylor_channels(w: Tensor, g: Tensor, h: Tensor, axis: int, kind: str) -> Tensor:
    """Importance of each channel along an axis of one weight: |sum of its elements' TERMS|. Returns (channels,)."""
    return along_axis(TERMS[kind](w, g, h), axis).abs()


def taylor_scores(backend: Backend, found: AveragedGradients, seed: int, kind: str) -> dict[str, FloatArray]:
    """Importance of every unit, summed over its channels and members (LLM-Pruner's default aggregation)."""

    def channels(group: CoupledGroup, member: AxisSlice, weight: Tensor) -> Tensor:
        g, h = found.mean[member.tensor], found.square[member.tensor]
        return taylor_channels(weight.float(), g, h, member.axis, kind)

    return score_units(backend, channels)


VECTOR, ELEMENT1, ELEMENT2, MIXED = (
    Baseline(scores=partial(taylor_scores, kind=kind), measure=gradients, bytes_per_weight=8) for kind in TERMS
)
