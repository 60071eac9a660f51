"""Removing units of a linear map and compensating by least squares (pure functions of tensors)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saap.models.loading.precision import in_float64, widest_dtype
from saap.models.walk.processes import Processes

ROUNDING = 1e-6
"""An error below this share of the target's energy is the rounding of float32 moments."""
RIDGES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
"""Ridges tried for each matrix, relative to the mean diagonal of the Gram matrix."""
CHOICE_RIDGE = 1e-2
"""Default ridge without held-out data to choose it."""
CHANNELS_AT_ONCE = 512
"""Rows of a Gram matrix per product: enough for speed, and few enough to skip nearly half of the entries."""
SMALLEST = 1e-18
"""Floor of costs and scores, so that their products can be compared."""


@dataclass(slots=True)
class Moments:
    """Second moments over tokens of a module's input x and its target output t.

    gram: (channels, channels) sum of x x^T. cross: (channels, outputs) sum of x t^T. energy: sum of |t|^2.
    """

    gram: Tensor
    cross: Tensor
    energy: float = 0.0
    tokens: int = 0

    @classmethod
    def empty(cls, channels: int, outputs: int, device: torch.device) -> Moments:
        """Moments of no tokens, float32."""
        return cls(torch.zeros(channels, channels, device=device), torch.zeros(channels, outputs, device=device))

    def add(self, x: Tensor, target: Tensor) -> None:
        """Add tokens. x: (tokens, channels), target: (tokens, outputs)."""
        for first in range(0, x.shape[1], CHANNELS_AT_ONCE):  # below the diagonal the matrix is symmetric
            rows, end = slice(first, first + CHANNELS_AT_ONCE), first + CHANNELS_AT_ONCE
            self.gram[rows, first:].addmm_(x[:, rows].T, x[:, first:])
            self.gram[end:, rows] = self.gram[rows, end:].T
        self.cross.addmm_(x.T, target)
        self.energy += float(target.square().sum(dtype=widest_dtype(target.device)))
        self.tokens += len(x)

    def total(self, processes: Processes) -> Moments:
        """Moments over the tokens of all processes; this object may be overwritten."""
        energies, tokens = zip(*processes.gather((self.energy, self.tokens)), strict=True)
        return Moments(processes.total(self.gram), processes.total(self.cross), sum(energies), sum(tokens))

    def error(self, weight: Tensor) -> float:
        """Squared error of the matrix `weight` (outputs, channels) on these tokens."""
        w = in_float64(weight)
        cross = float((w.T * in_float64(self.cross)).sum())
        return self.energy - 2 * cross + float(((w @ in_float64(self.gram)) * w).sum())

    def select(self, channels: Tensor) -> Moments:
        """Moments of some channels only. channels: (kept,) indices."""
        return Moments(self.gram[channels][:, channels], self.cross[channels], self.energy, self.tokens)


def ridge_fit(
    weight: Tensor, fit: Moments, held_out: Moments, ridges: Sequence[float] = RIDGES
) -> tuple[Tensor, float]:
    """Ridge regression from x to t, shrunk towards `weight`; held-out error selects the ridge.

    weight: (outputs, channels). For a ridge r, W minimises sum |t - W x|^2 + r mean(diag G) |W - weight|^2 over the
    tokens of `fit` and is evaluated on those of `held_out`. The search starts at the middle of `ridges` and moves on
    while the error decreases; the best penalty is then used on all tokens. `weight` is kept if no ridge is better, or
    if its error is only rounding. Returns W and the held-out error of its ridge divided by that of `weight`. `fit`
    receives the sums of both sets, to avoid a second copy of large matrices.
    """
    start = held_out.error(weight)
    if start <= ROUNDING * held_out.energy:
        return weight, 1.0
    best, error = best_ridge(ridges, _held_out_error(_ridge_regression(weight, fit), held_out))
    if not error < start:
        return weight, 1.0
    share = fit.tokens / max(1, fit.tokens + held_out.tokens)
    fit.gram += held_out.gram
    fit.cross += held_out.cross
    return _ridge_regression(weight, fit)(best * share).to(weight), max(0.0, error) / start


def _held_out_error(regression: Callable[[float], Tensor], held_out: Moments) -> Callable[[float], float]:
    return lambda ridge: held_out.error(regression(ridge))


def best_ridge(ridges: Sequence[float], error_of: Callable[[float], float]) -> tuple[float, float]:
    """The ridge of a local minimum of the error, searched downhill from the middle one, and its error."""
    at = len(ridges) // 2
    error = error_of(ridges[at])
    for turn in (-1, 1):
        moved = False
        while 0 <= at + turn < len(ridges) and (found := error_of(ridges[at + turn])) < error:
            at, error, moved = at + turn, found, True
        if moved:
            break
    return ridges[at], error


def _ridge_regression(weight: Tensor, moments: Moments) -> Callable[[float], Tensor]:
    """For any ridge r, weight + (T - weight G) (G + r mean(diag G))^-1 in float64, T = sum of t x^T."""
    gram, dense = in_float64(moments.gram), in_float64(weight)
    missing, diagonal = in_float64(moments.cross) - gram @ dense.T, gram.diagonal().clone()
    scale = diagonal.mean().clamp_min(1e-30)

    def solved(ridge: float) -> Tensor:
        gram.diagonal().copy_(diagonal + max(ridge, 1e-9) * scale)
        return dense + torch.cholesky_solve(missing, torch.linalg.cholesky(gram)).T

    return solved


def _damped(gram: Tensor, ridge: float) -> Tensor:
    damped = gram.clone()
    damped.diagonal().add_(ridge * gram.diagonal().mean().clamp_min(1e-30))
    return damped


def compensated(weight: Tensor, gram: Tensor, kept: Tensor, *, ridge: float = CHOICE_RIDGE) -> Tensor:
    """Least-squares approximation of `weight` from some of its input channels; zero for the others.

    weight: (outputs, channels), gram: (channels, channels), kept: (kept channels,) indices. Minimises the squared
    output error plus the ridge; equal to the compensated matrix of `removal_order`. Returns (outputs, channels).
    """
    g = _damped(in_float64(gram), ridge)
    columns = kept.to(g.device)  # another device if that of `gram` has no float64
    factor = torch.linalg.cholesky(g[columns][:, columns])
    result = torch.zeros_like(weight)
    result[:, kept] = torch.cholesky_solve(g[columns] @ in_float64(weight).T, factor).T.to(weight)
    return result


def removal_order(
    weight: Tensor,
    gram: Tensor,
    units: Tensor,
    remove: int,
    *,
    ridge: float = CHOICE_RIDGE,
    at_once: int = 32,
    scores: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Greedy second-order removal order: each step removes the units that the others compensate for best.

    weight: (outputs, channels) of the consumer. gram: (channels, channels) of its inputs.
    units: (units, width) channel indices. remove: how many, at least one, `at_once` at a time; weight and inverse Gram
    matrix are updated after each batch, in the type of `gram`: float32 is enough with the default ridge.
    Cost of unit u: tr(W_u [G^-1]_uu^-1 W_u^T), the squared output error after all other columns have compensated.
    Source: OBS (Hassibi and Stork 1993) in its structured form.
    scores: (units,) importance of each unit for the loss; the cost is then the geometric mean of the two, so that a
    unit is removed early only if the neighbours can replace it and the loss is not sensitive to it.
    Returns (remove,) the units in the order of removal and (remove,) the cost of each, not decreasing.
    """
    w = weight.to(gram.dtype, copy=True)
    inverse = torch.linalg.inv(_damped(gram, ridge))
    alive = torch.ones(len(units), dtype=torch.bool, device=w.device)
    order: list[Tensor] = []
    costs: list[Tensor] = []
    for start in range(0, remove, at_once):
        cost = _unit_costs(w, inverse, units)
        if scores is not None:
            cost = (cost.clamp_min(SMALLEST) * scores.to(cost.dtype).clamp_min(SMALLEST)).sqrt()
        cost[~alive] = torch.inf
        chosen = cost.argsort()[: min(at_once, remove - start)]
        columns = units[chosen].flatten()
        block = inverse[:, columns]
        solved = torch.linalg.solve(block[columns], block.T)
        w.addmm_(w[:, columns], solved, alpha=-1)
        inverse.addmm_(block, solved, alpha=-1)
        w[:, columns] = 0
        inverse[columns] = 0
        inverse[:, columns] = 0
        inverse[columns, columns] = 1
        alive[chosen] = False
        order.append(chosen)
        costs.append(cost[chosen])
    return torch.cat(order), torch.cat(costs).cummax(0).values


def _unit_costs(weight: Tensor, inverse: Tensor, units: Tensor) -> Tensor:
    if units.shape[1] == 1:
        columns = units[:, 0]
        squares: Tensor = weight.square().sum(0)
        return squares[columns] / inverse.diagonal()[columns]
    blocks = inverse[units.unsqueeze(-1), units.unsqueeze(1)]
    slices = weight[:, units].transpose(0, 1)
    solved: Tensor = torch.linalg.solve(blocks, slices.transpose(1, 2))
    return (solved * slices.transpose(1, 2)).sum((1, 2))
