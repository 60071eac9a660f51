"""Second-order choice of units and ridge refit of the matrix that consumes them (pure functions of tensors)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Moments:
    """Weighted second moments over tokens of a module's input x and of the output t that it should give.

    gram: (channels, channels) sum of x x^T. cross: (channels, outputs) sum of x t^T. energy: sum of |t|^2.
    """

    gram: Tensor
    cross: Tensor
    energy: float = 0.0

    @classmethod
    def empty(cls, channels: int, outputs: int, device: torch.device) -> Moments:
        """Moments of no tokens, float32."""
        return cls(torch.zeros(channels, channels, device=device), torch.zeros(channels, outputs, device=device))

    def add(self, x: Tensor, target: Tensor, weight: Tensor) -> None:
        """Add tokens. x (tokens, channels), target (tokens, outputs), weight (tokens,): each token's share."""
        scale = weight.sqrt().unsqueeze(-1)
        x, target = x * scale, target * scale
        self.gram.addmm_(x.T, x)
        self.cross.addmm_(x.T, target)
        self.energy += float(target.square().sum(dtype=torch.float64))

    def error(self, weight: Tensor) -> float:
        """Weighted squared error of the matrix `weight` (outputs, channels) on these tokens."""
        w = weight.double()
        cross = float((w.T * self.cross.double()).sum())
        return self.energy - 2 * cross + float(((w @ self.gram.double()) * w).sum())

    def select(self, channels: Tensor) -> Moments:
        """Moments of some channels only. channels: (kept,) indices."""
        return Moments(self.gram[channels][:, channels], self.cross[channels], self.energy)


def ridge_refit(weight: Tensor, fit: Moments, held: Moments, ridges: Sequence[float]) -> tuple[Tensor, float]:
    """The matrix nearest to `weight` in the ridge sense that maps x to t; the ridge is chosen by held-out error.

    weight: (outputs, channels). Minimises sum_fit w |t - W x|^2 + r * mean(diag G) * |W - weight|^2 for each ridge r
    and keeps the W with the least error on `held`; `weight` itself stays if none is better.
    Returns W and its held-out error divided by that of `weight`.
    """
    gram = fit.gram.double()
    values, vectors = torch.linalg.eigh(gram)
    scale = gram.diagonal().mean().clamp_min(1e-30)
    dense = weight.double()
    right = vectors.T @ (fit.cross.double() - gram @ dense.T)
    best, start = dense, held.error(dense)
    least = start
    for ridge in ridges:
        change = vectors @ (right / (values.clamp_min(0) + ridge * scale).unsqueeze(-1))
        candidate = dense + change.T
        error = held.error(candidate)
        if error < least:
            best, least = candidate, error
    return best.to(weight.dtype), least / start if start > 0 else 1.0


def second_order_order(
    weight: Tensor, gram: Tensor, units: Tensor, remove: int, *, ridge: float = 1e-2, at_once: int = 32
) -> Tensor:
    """Greedy second-order choice (optimal brain surgeon) of the units whose loss is best made good by the others.

    weight: (outputs, channels) of the consumer. gram: (channels, channels) of its inputs. units: (units, width)
    channel indices. remove: how many leave, `at_once` at a time; both the weight and the inverse Gram matrix are
    updated after each batch. Cost of unit u: tr(W_u [G^-1]_uu^-1 W_u^T), the squared output error left after all
    other columns have adjusted. Source: OBS (Hassibi and Stork 1993) in its structured form.
    Returns (remove,) the units in the order of leaving.
    """
    g = gram.double()
    g = g + ridge * g.diagonal().mean() * torch.eye(len(g), dtype=g.dtype, device=g.device)
    w, inverse = weight.double().clone(), torch.linalg.inv(g)
    alive = torch.ones(len(units), dtype=torch.bool, device=w.device)
    order: list[Tensor] = []
    left = remove
    while left > 0:
        cost = _unit_costs(w, inverse, units)
        cost[~alive] = torch.inf
        chosen = cost.argsort()[: min(at_once, left)]
        columns = units[chosen].flatten()
        block = inverse[:, columns]
        solved = torch.linalg.solve(block[columns], block.T)
        w -= w[:, columns] @ solved
        inverse -= block @ solved
        w[:, columns] = 0
        inverse[columns] = 0
        inverse[:, columns] = 0
        inverse[columns, columns] = 1
        alive[chosen] = False
        order.append(chosen)
        left -= len(chosen)
    return torch.cat(order) if order else torch.empty(0, dtype=torch.long, device=w.device)


def _unit_costs(weight: Tensor, inverse: Tensor, units: Tensor) -> Tensor:
    if units.shape[1] == 1:
        columns = units[:, 0]
        squares: Tensor = weight[:, columns].square().sum(0)
        return squares / inverse.diagonal()[columns]
    blocks = inverse[units.unsqueeze(-1), units.unsqueeze(1)]
    slices = weight[:, units].transpose(0, 1)
    solved: Tensor = torch.linalg.solve(blocks, slices.transpose(1, 2))
    return (solved * slices.transpose(1, 2)).sum((1, 2))
