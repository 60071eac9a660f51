"""The true effect of removing one unit, measured by doing it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from saap.core.records import FloatArray, ModelGraph
from saap.models.structure.masking import masked
from saap.models.walk.walker import BlockWalker, inference_only


@dataclass(frozen=True, slots=True)
class Effect:
    """What the removal of one unit does, by sample: both (samples,), nats per predicted token.

    loss: the mean negative log-likelihood without the unit minus that with it. divergence: from the dense model's
    predictions to those without the unit.
    """

    loss: FloatArray
    divergence: FloatArray


class RemovalEffects:
    """Removes units of one decoder block, one at a time, and looks at the loss.

    tokens: (samples, length) ids. The block's input and the dense predictions are kept, so that each unit costs a run
    from that block to the end.
    """

    def __init__(self, model: nn.Module, graph: ModelGraph, layer: int, tokens: Tensor) -> None:
        self._model, self._graph, self._layer, self._tokens = model, graph, layer, tokens
        self._walker = BlockWalker(model, graph.blocks)
        with torch.no_grad(), inference_only(model):
            stream = self._walker.start(tokens)
            self._contexts, hidden = stream.contexts, stream.hidden
            for index in range(layer):
                hidden = self._walker.run_block(index, hidden, self._contexts)
            self._entry = hidden
            self._dense = list(self._predictions())
        self._dense_loss = np.array([self._loss(logs, sample) for sample, logs in enumerate(self._dense)])

    def of(self, group: str, unit: int) -> Effect:
        """The effect of removing `unit` of `group`, a group of this block."""
        kept = tuple(other for other in range(self._graph.group(group).units) if other != unit)
        loss, divergence = [], []
        with torch.no_grad(), inference_only(self._model), masked(self._model, self._graph, {group: kept}):
            for sample, logs in enumerate(self._predictions()):
                loss.append(self._loss(logs, sample))
                dense = self._dense[sample]
                apart = nn.functional.kl_div(logs, dense, log_target=True, reduction="sum")
                divergence.append(float(apart) / len(dense))
        return Effect(np.array(loss) - self._dense_loss, np.array(divergence))

    def _predictions(self) -> Iterator[Tensor]:
        """Log-probabilities of the next token, sample by sample: (length - 1, vocabulary)."""
        hidden = self._entry
        for index in range(self._layer, len(self._graph.blocks)):
            hidden = self._walker.run_block(index, hidden, self._contexts)
        for row in range(len(hidden)):
            yield self._walker.logits(hidden[row : row + 1])[0, :-1].float().log_softmax(-1)

    def _loss(self, logs: Tensor, sample: int) -> float:
        wanted = self._tokens[sample, 1:].unsqueeze(-1).to(logs.device)
        return -float(logs.gather(-1, wanted).double().mean())


def sampled_units(units: int, wanted: int, seed: int) -> list[int]:
    """Units drawn without replacement, ascending; all of them where there are no more than `wanted`."""
    if units <= wanted:
        return list(range(units))
    return sorted(int(unit) for unit in np.random.default_rng(seed).choice(units, size=wanted, replace=False))


def spread_layers(layers: int, wanted: int) -> Sequence[int]:
    """Layers that lie evenly from the first to the last."""
    return sorted({round(place) for place in np.linspace(0, layers - 1, min(wanted, layers))})
