"""Token-level Fisher importance: how sensitive the loss is to each unit at every single token of a text."""

from collections.abc import Collection

import torch
from torch import Tensor

from saap.core.records import FloatArray
from saap.models.structure.keep_index import sole_consumers, unit_channels, units_of
from saap.models.structure.linear import weight_out_in
from saap.models.walk.backend import Backend
from saap.models.walk.observer import Observation, Observer, Signal
from saap.models.walk.processes import Processes
from saap.models.walk.walk import walk


class TokenFisher(Observer):
    """By group, for each unit the mean over tokens of (g_t W_u x_tu)^2: (units,).

    x_tu is what the module that reads the group's channels takes from unit u at token t, W_u its columns, g_t the
    gradient of the sequence's summed loss at its output: to first order, what the loss changes if the unit is silent at
    that token alone. The element-wise score squares the sum over a sample's tokens instead, in which they cancel each
    other. Only groups whose channels one module reads have these scores.
    """

    def __init__(self, backend: Backend, tokens: int) -> None:
        self._model, self._tokens = backend.model, tokens
        self._groups = sole_consumers(backend.graph)
        self._units = {path: unit_channels(one.consumers[0], one.units) for path, one in self._groups.items()}
        self._sums = {path: torch.zeros(len(rows), device=backend.device) for path, rows in self._units.items()}
        self.needs = dict.fromkeys(self._groups, Signal.INPUT | Signal.OUTPUT_GRADIENT)

    def observe(self, seen: Observation) -> None:
        """Add the squares of one module's tokens."""
        x = seen.x.flatten(0, -2).float()
        gradient = seen.dy.flatten(0, -2).float() * seen.batch.predictions
        change = (gradient @ weight_out_in(self._model.get_submodule(seen.site)).float()) * x
        of_units, sums = units_of(change, self._units[seen.site].to(change.device)), self._sums[seen.site]
        sums += of_units.square().sum(0).to(sums.device)

    def merge(self, processes: Processes) -> None:
        """Sums over the tokens of all processes."""
        self._sums = {path: processes.total(found) for path, found in self._sums.items()}

    def result(self) -> dict[str, FloatArray]:
        """The means, by group."""
        return {self._groups[path].name: (one / self._tokens).cpu().numpy() for path, one in self._sums.items()}


def token_fisher_scores(
    backend: Backend, tokens: Tensor, *, micro_batch: int = 4, ignored: Collection[int] = ()
) -> dict[str, FloatArray]:
    """Token-level Fisher importance by group, over `tokens` (sequences, length): see `TokenFisher`.

    ignored: ids of which no loss is taken. Raises NonFiniteLossError.
    """
    fisher = TokenFisher(backend, tokens.numel())
    walk(backend, tokens, [fisher], micro_batch=micro_batch, ignored=ignored)
    return fisher.result()
