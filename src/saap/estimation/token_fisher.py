"""Token-level Fisher importance: sensitivity of the loss to each unit at each single token."""

from collections.abc import Sequence

from saap.core.records import CoupledGroup
from saap.estimation.importance import Scoring, second_order
from saap.estimation.unit_importance import UnitImportance
from saap.models.structure.keep_index import sole_consumers, unit_channels, units_of
from saap.models.structure.linear import weight_out_in
from saap.models.walk.backend import Backend
from saap.models.walk.observer import Observation, Signal
from saap.settings.prune import Aggregation


class TokenFisher(UnitImportance):
    """Half the mean over a sample's tokens of (g_t W_u x_tu)^2 for each unit, in nats per token: (samples, units).

    x_tu is the input of the consuming module from unit u at token t, W_u its columns, and g_t the gradient of the
    sequence's summed loss at its output. By the Fisher information, this is the loss increase if the unit is zeroed at
    that token alone. The element-wise score squares the sum over a sample's tokens instead, in which tokens cancel each
    other. Groups with several consumers, and experts, use the element-wise score of second order.
    """

    def __init__(self, backend: Backend, groups: Sequence[CoupledGroup]) -> None:
        names = {group.name for group in groups}
        self._sole = {path: one for path, one in sole_consumers(backend.graph).items() if one.name in names}
        own = {group.name for group in self._sole.values()}
        super().__init__(backend, [one for one in groups if one.name not in own], second_order, Aggregation.SUM)
        self._names = [group.name for group in groups]
        self._channels = {path: unit_channels(one.consumers[0], one.units) for path, one in self._sole.items()}
        for path in self._sole:
            self.needs[path] = self.needs.get(path, Signal(0)) | Signal.INPUT | Signal.OUTPUT_GRADIENT

    def observe(self, seen: Observation) -> None:
        """Score the units that one module consumes, and the parts of other groups in it."""
        if seen.site in self._parts:
            super().observe(seen)
        if seen.site not in self._sole:
            return
        batch, weight = seen.batch, weight_out_in(self._model.get_submodule(seen.site)).float()
        x, dy = (batch.by_sample(one, seen.site).float() for one in (seen.x, seen.dy))
        change = ((dy * batch.predictions) @ weight) * x
        of_units = units_of(change.flatten(0, 1), self._channels[seen.site].to(change.device))
        squares = of_units.view(*change.shape[:2], -1).square()
        self.add(self._sole[seen.site].name, batch, 0.5 * squares.mean(1))


TOKEN_FISHER = Scoring(observer=TokenFisher)
