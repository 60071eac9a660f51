"""An independent way to the coupled groups of one block: numbers alone, no graph, no names of operations.

Of the input channels of one linear layer all but one are zeroed. What lives in the block only for the others then
gets no gradient. So for each input channel one learns which rows of which parameters serve it; channels that share a
row belong to one unit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tests.families import token_ids
from torch import Tensor, nn

Axis = tuple[str, int]
Unit = frozenset[tuple[str, int, int]]

RELATIVE_ZERO = 1e-11
ABSOLUTE_ZERO = 1e-9


class _GenericPosition(torch.overrides.TorchFunctionMode):
    """No zeros by accident of the data (ReLU), and no gradient through the statistics of norms."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in ("relu", "relu_"):
            return nn.functional.softplus(args[0])
        if name in ("mean", "rsqrt"):
            return function(*args, **kwargs).detach()
        if name == "layer_norm":
            return _layer_norm(*args, **kwargs)
        return function(*args, **kwargs)


def _layer_norm(
    inputs: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    centre = inputs.mean(-1, keepdim=True).detach()
    spread = (inputs - centre).pow(2).mean(-1, keepdim=True).add(eps).rsqrt().detach()
    output = (inputs - centre) * spread
    output = output if weight is None else output * weight
    return output if bias is None else output + bias


class Oracle:
    """Gradients of a random function of the output of one block with respect to the parameters of one block."""

    def __init__(self, model: nn.Module, block: str, *, contracted: int = 2) -> None:
        self.model, self.contracted = model, contracted  # the axis of stacked matrices that reads
        for module in model.modules():
            if hasattr(module, "top_k") and hasattr(module, "num_experts"):
                module.top_k = module.num_experts  # every expert has a part in every token
        self.parameters = {n: p for n, p in model.named_parameters() if n.startswith(block + ".")}
        self.block = model.get_submodule(block)
        self.arguments, self.keywords = self._inputs_of_block()
        self.weights: Tensor | None = None
        self.base = self._strength({})

    def _inputs_of_block(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        handle = self.block.register_forward_pre_hook(
            lambda module, arguments, keywords: seen.append((arguments, keywords)), with_kwargs=True
        )
        self.model(token_ids(2, 5), use_cache=False)
        handle.remove()
        return seen[0]

    def units(self) -> set[Unit]:
        """All units of groups that some linear layer of the block reads and other parameters of it make."""
        anchors = {axis: served for axis in self._inputs() if (served := self._partly_served(axis))}
        service: dict[Axis, dict[Axis, list[Tensor]]] = {axis: defaultdict(list) for axis in anchors}
        for index in range(max(self._size(axis) for axis in anchors)):
            alive = self._alive({axis: index % self._size(axis) for axis in anchors})
            for axis, served in anchors.items():
                if index < self._size(axis):
                    for other in served:
                        service[axis][other].append(alive[other])
        return {unit for axis, rows in service.items() for unit in self._joined(axis, rows)}

    def _partly_served(self, axis: Axis) -> list[Axis]:
        alive = self._alive({axis: self._size(axis) // 3})
        served = [
            other
            for other, rows in alive.items()
            if other[0] != axis[0] and 0 < int(rows.sum()) < int((self.base[other] > ABSOLUTE_ZERO).sum())
        ]
        # A norm's weight alone is the hidden axis, which other layers read too.
        return served if any(self.parameters[name].ndim > 1 for name, _ in served) else []

    def _joined(self, anchor: Axis, rows: dict[Axis, list[Tensor]]) -> Iterator[Unit]:
        size = self._size(anchor)
        leader = list(range(size))

        def find(item: int) -> int:
            while leader[item] != item:
                item = leader[item]
            return item

        columns = {
            (axis, row): [index for index in range(size) if service[index][row]]
            for axis, service in rows.items()
            for row in range(len(service[0]))
        }
        for indices in columns.values():
            for other in indices[1:]:
                leader[find(other)] = find(indices[0])
        units: dict[int, set[tuple[str, int, int]]] = defaultdict(set)
        for index in range(size):
            units[find(index)].add((*anchor, index))
        for ((name, dim), row), indices in columns.items():
            if indices:
                units[find(indices[0])].add((name, dim, row))
                bias = name.removesuffix("weight") + "bias"
                # Softmax does not feel the bias of the keys, so the gradient cannot: it goes with its weight.
                if bias in self.parameters and self._size((bias, 0)) == self._size((name, dim)):
                    units[find(indices[0])].add((bias, 0, row))
        return (frozenset(unit) for unit in units.values())

    def _inputs(self) -> Iterator[Axis]:
        for name, parameter in self.parameters.items():
            if parameter.ndim == 3:
                yield name, self.contracted  # the matrices of the experts, stacked
            if parameter.ndim == 2:
                module = self.model.get_submodule(name.rpartition(".")[0])
                yield name, 0 if type(module).__name__ == "Conv1D" else 1

    def _size(self, axis: Axis) -> int:
        return self.parameters[axis[0]].shape[axis[1]]

    def _alive(self, kept: dict[Axis, int]) -> dict[Axis, Tensor]:
        strength = self._strength(kept)
        return {
            axis: (rows > RELATIVE_ZERO * self.base[axis].clamp_min(1e-30)) & (self.base[axis] > ABSOLUTE_ZERO)
            for axis, rows in strength.items()
        }

    def _strength(self, kept: dict[Axis, int]) -> dict[Axis, Tensor]:
        """Largest gradient in each row of each axis while only one index of some axes is there."""
        with self._only(kept), _GenericPosition(), torch.enable_grad():
            for parameter in self.parameters.values():
                parameter.requires_grad_(True)
            output = self.block(*self.arguments, **self.keywords)
            hidden = output[0] if isinstance(output, tuple) else output
            if self.weights is None:
                self.weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3), dtype=hidden.dtype)
            gradients = torch.autograd.grad((hidden * self.weights).sum(), list(self.parameters.values()))
        return {
            (name, axis): gradient.abs().movedim(axis, 0).flatten(1).amax(1) if gradient.ndim > 1 else gradient.abs()
            for name, gradient in zip(self.parameters, gradients, strict=True)
            for axis in range(gradient.ndim)
        }

    @contextmanager
    def _only(self, kept: dict[Axis, int]) -> Iterator[None]:
        before = {name: self.parameters[name].data for name, _ in kept}
        for (name, axis), index in kept.items():
            parameter = self.parameters[name]
            others = [other for other in range(parameter.shape[axis]) if other != index]
            parameter.data = parameter.data.index_fill(axis, torch.tensor(others), 0.0)
        try:
            yield
        finally:
            for name, data in before.items():
                self.parameters[name].data = data
