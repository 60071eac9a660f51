"""Least squares for stacked matrices: each expert's output from the channels that it keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from saap.core.records import CoupledGroup
from saap.models.structure.least_squares import Moments, compensated, ridge_fit
from saap.models.walk.processes import Processes

_PRODUCTS = (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__)


@dataclass(frozen=True, slots=True)
class Stack:
    """The matrices that consume the channels of one bundle of experts.

    tensor: their parameter, one matrix for each group along axis 0. axis: of a matrix, contracted with the channels.
    """

    tensor: str
    axis: int
    groups: tuple[CoupledGroup, ...]

    def matrix(self, stack: Tensor, place: int) -> Tensor:
        """A view of one matrix as (outputs, channels)."""
        return stack[place] if self.axis == 1 else stack[place].T


def stacks_of(groups: Sequence[CoupledGroup]) -> list[Stack]:
    """The stacks of these groups whose channels have one consumer each."""
    bundles: dict[str, list[CoupledGroup]] = {}
    for group in groups:
        if len(group.consumers) == 1 and group.consumers[0].part is not None:
            bundles.setdefault(group.consumers[0].tensor, []).append(group)
    return [Stack(tensor, found[0].consumers[0].axis - 1, tuple(found)) for tensor, found in bundles.items()]


def fit_columns(weight: Tensor, columns: Tensor, fit: Moments, held_out: Moments) -> tuple[Tensor, float]:
    """The columns of a matrix that keep its output nearest, and the held-out error relative to the unchanged ones.

    weight: (outputs, channels). columns: (kept,) indices. Without any tokens the columns stay as they are, without
    held-out ones the ridge is the default one.
    """
    if held_out.tokens:
        return ridge_fit(weight[:, columns], fit.select(columns), held_out.select(columns))
    return (compensated(weight, fit.gram, columns) if fit.tokens else weight)[:, columns], 1.0


class GramMatrices:
    """Gram matrices (channels, channels) of what each matrix of some stacks reads, in float32, and numbers of tokens.

    One for the sequences to fit on and one for those that are held out.
    """

    def __init__(self, model: nn.Module, stacks: Sequence[Stack]) -> None:
        self.parameters = {stack.tensor: model.get_parameter(stack.tensor) for stack in stacks}
        self.found: dict[tuple[str, int, bool], Moments] = {}
        for stack in stacks:
            parameter = self.parameters[stack.tensor]
            for place, held_out in product(range(len(stack.groups)), (False, True)):
                empty = Moments.empty(parameter.shape[1 + stack.axis], 0, parameter.device)
                self.found[stack.tensor, place, held_out] = empty

    @contextmanager
    def observed(self, *, held_out: bool) -> Iterator[None]:
        """Context in which the products with the stacks are observed."""

        def add(tensor: str, place: int, x: Tensor) -> None:
            rows = x.flatten(0, -2).float()
            self.found[tensor, place, held_out].add(rows, rows.new_zeros(len(rows), 0))

        with Products({parameter: name for name, parameter in self.parameters.items()}, add):
            yield

    def moments(self, stack: Stack, place: int, weight: Tensor, processes: Processes, *, held_out: bool) -> Moments:
        """Moments of one matrix over all processes, with the outputs of `weight` (outputs, channels) as the target."""
        found = self.found.pop((stack.tensor, place, held_out)).total(processes)
        cross = found.gram @ weight.T
        return Moments(found.gram, cross, float((weight.T * cross).sum()), found.tokens)


class Products(TorchFunctionMode):
    """Shows what is multiplied with the matrices of stacked parameters: one by one, or all of them at once."""

    def __init__(self, stacks: Mapping[Tensor, str], show: Callable[[str, int, Tensor], None]) -> None:
        super().__init__()
        self.stacks, self.show = WeakTensorKeyDictionary(dict(stacks)), show
        self.matrices = WeakTensorKeyDictionary()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Sequence[Any] = (), keywords: Any = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        first, second = (*arguments[:2], None, None)[:2]
        if function is Tensor.__getitem__ and first in self.stacks and result.ndim == 2:
            self.matrices[result] = self.stacks[first], int(second)
        elif function in _PRODUCTS and isinstance(second, Tensor) and second in self.matrices:
            name, place = self.matrices[second]
            self.show(name, place, first)
        elif function is torch.bmm and second in self.stacks:
            for place, rows in enumerate(first):
                self.show(self.stacks[second], place, rows)
        return result


@contextmanager
def one_by_one(model: nn.Module) -> Iterator[None]:
    """Context in which experts compute matrix by matrix instead of in one grouped product."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if hasattr(config, "_experts_implementation")}
    with ExitStack() as stack:
        for config in configs.values():
            stack.callback(setattr, config, "_experts_implementation", config._experts_implementation)
            config._experts_implementation = "eager"
        yield
