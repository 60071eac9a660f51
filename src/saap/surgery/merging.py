"""Merging: the kept experts of a layer take over what the removed ones added to its output, by least squares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from saap.core.errors import UnsupportedModelError
from saap.core.records import CoupledGroup, Role
from saap.models.loading.precision import at_least_float32
from saap.models.structure.least_squares import Moments, ridge_fit
from saap.models.structure.routing import experts_and_gates
from saap.models.walk.backend import Backend
from saap.models.walk.observer import Capture, capture
from saap.models.walk.offload import onload
from saap.models.walk.processes import Processes
from saap.models.walk.spill import Keep, Tensors
from saap.surgery.stacked import Products, Stack, one_by_one, stacks_of

MOMENTS_BYTES = 2**27
"""Memory of the moments of the experts that are fitted together; each further batch reads the captured calls again."""
ROUNDING = 0.05
"""Relative difference of two outputs that rounding to 16 bits explains."""
WITHOUT = "Leave out --merge-experts"


def rows_to_fit(x: Tensor, weight: Tensor, gate: Tensor, total: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the least-squares problem of one kept expert: inputs of its matrix W, and their targets.

    x: (rows, channels), of the tokens routed to it. weight: (outputs, channels), W. gate: (rows, 1), of this expert.
    total: (rows, 1), of all experts of the token. missing: (rows, outputs), m = dense output - present output.
    Each expert of a token is to add m / total to its output, so that the gated sum adds m. With s = gate / total, a
    row is sqrt(s) total x, and its target sqrt(s) (total W x + m). The layer's squared error is at most the sum of
    those of its experts (Jensen), so fits that are better than W never make it larger.
    Source: experts merged as outputs by least squares, MergeMoE (Miao et al. 2025, arXiv 2510.14436).
    """
    scale = (gate / total.clamp_min(1e-12)).sqrt()
    rows = scale * total * x
    return rows, rows @ weight.T + scale * missing


def merged_stacks(groups: Sequence[CoupledGroup], keep: Mapping[str, Sequence[int]]) -> dict[str, Stack]:
    """The stacked down projections of a block that loses experts, by the path of the experts' module."""
    if all(len(keep.get(one.name, range(one.units))) == one.units for one in groups if one.role is Role.EXPERT):
        return {}
    stacked = {member.tensor for one in groups if one.role is Role.EXPERT for member in one.members}
    return {one.tensor.rpartition(".")[0]: one for one in stacks_of(groups) if one.tensor in stacked}


@torch.no_grad()
def require_mergeable(backend: Backend) -> None:
    """Raise UnsupportedModelError unless the experts of every layer can be merged.

    Two tokens run up to the first layer with experts, since only a call shows what its module is called with.
    """
    graph, walker = backend.graph, backend.walker()
    nothing = {group.name: () for group in graph.of_role(Role.EXPERT)}
    found = {layer: merged_stacks(graph.in_block(layer), nothing) for layer in range(len(graph.blocks))}
    layers = sorted({group.layer for group in graph.of_role(Role.EXPERT)})
    for layer in layers:
        if len(found[layer]) != 1:
            raise UnsupportedModelError(f"The experts of {graph.blocks[layer]} have no matrices to fit", WITHOUT)
    if layers:
        ((site, stack),) = found[layers[0]].items()
        stream = walker.start(torch.tensor([[0, 1]], device=backend.device))
        hidden = stream.hidden
        for layer in range(layers[0]):
            hidden = walker.run_block(layer, hidden, stream.contexts)
        with capture(backend.model, [site], stop=True) as seen:
            walker.run_block(layers[0], hidden, stream.contexts)
        arguments = seen[site].arguments if site in seen else ()
        routed = experts_and_gates(arguments)
        if routed is None or any(not isinstance(one, Tensor) or len(one) != len(routed[0]) for one in arguments):
            raise UnsupportedModelError(f"{site} is not called with the experts of each token and their gates", WITHOUT)
        onload(backend.model, stack.tensor)
        if not _is_linear(backend.model, stack, arguments, seen[site].output):
            raise UnsupportedModelError(f"{site} does not return a weighted sum of its down projections", WITHOUT)


def _is_linear(model: nn.Module, stack: Stack, arguments: tuple[Any, ...], output: object) -> bool:
    """Whether the output of experts is a tensor, and linear in their down projections up to a bias."""
    path, _, name = stack.tensor.rpartition(".")
    experts, parameter = model.get_submodule(path), model.get_parameter(stack.tensor)
    if not isinstance(output, Tensor):
        return False
    scaled = (functional_call(experts, {name: scale * parameter}, arguments) for scale in (0.5, 0))
    whole, half, none = map(at_least_float32, (output, *scaled))
    return bool(((whole + none) / 2 - half).norm() <= ROUNDING * whole.norm())


@torch.no_grad()
def merge_experts(
    model: nn.Module, stack: Stack, calls: Iterable[tuple[Capture, int]], dense: Iterable[Tensor], keep: Keep,
    processes: Processes,
) -> float:  # fmt: skip
    """Fit the down projections of a layer's kept experts to the dense layer's output, in place.

    calls: of the experts' module after the removal, in the micro-batches of this process, and how many tokens of each
    are fitted; the others choose the ridge. dense: its output in the dense model, in the same micro-batches.
    Returns the mean held-out error of the matrices relative to before.
    """
    seen = _Calls(keep)
    for (call, fitted), output in zip(calls, dense, strict=True):
        seen.add(call, output, fitted)
    onload(model, stack.tensor, change=True)
    parameter, errors = model.get_parameter(stack.tensor), []
    outputs, channels = stack.matrix(parameter, 0).shape
    at_once = max(1, MOMENTS_BYTES // (8 * channels * (channels + outputs)))
    for first in range(0, len(parameter), at_once):
        places = range(first, min(first + at_once, len(parameter)))
        with one_by_one(model):
            moments = seen.moments(model, stack, places)
        for place in places:
            weight = stack.matrix(parameter, place)
            plain = weight.float().clone()
            fit, held_out = (one.total(processes) for one in moments.pop(place))
            fits = processes.first and fit.tokens > 0 and held_out.tokens > 0
            new, error = ridge_fit(plain, fit, held_out) if fits else (plain, 1.0)
            weight.copy_(processes.broadcast(new))
            errors.append(processes.broadcast_result(partial(float, error)))
    return sum(errors) / len(errors)


class _Calls:
    """Calls of the experts of a layer, kept by argument.

    By call, missing is the dense output less the present one, and fitted the number of its first tokens to fit on.
    """

    def __init__(self, keep: Keep) -> None:
        self.keep, self.missing = keep, keep(())
        self.arguments: list[Tensors] = []
        self.fitted: list[int] = []

    def add(self, call: Capture, dense: Tensor, fitted: int) -> None:
        """Add the call of one micro-batch."""
        self.arguments = self.arguments or [self.keep(()) for _ in call.arguments]
        for kept, argument in zip(self.arguments, call.arguments, strict=True):
            kept.append(argument)
        self.missing.append(at_least_float32(dense) - at_least_float32(call.output))
        self.fitted.append(fitted)

    def moments(self, model: nn.Module, stack: Stack, places: range) -> dict[int, tuple[Moments, Moments]]:
        """Moments of some experts, by place in the stack: to fit on, and held out."""
        parameter, experts = model.get_parameter(stack.tensor), model.get_submodule(stack.tensor.rpartition(".")[0])
        outputs, channels = stack.matrix(parameter, 0).shape
        empty = partial(Moments.empty, channels, outputs, parameter.device)
        found = {place: (empty(), empty()) for place in places}
        for *arguments, missing, fitted in zip(*self.arguments, self.missing, self.fitted, strict=True):
            routed = experts_and_gates(arguments)
            assert routed is not None  # as `require_mergeable` has found
            numbers, gates = routed[0], routed[1].float()
            total = gates.masked_fill(numbers >= len(parameter), 0).sum(1, keepdim=True)  # beyond have no weights
            for place in places:
                rows, turns = (numbers == place).nonzero(as_tuple=True)
                if len(rows):
                    own = [one[rows, turns, None] if one.shape == numbers.shape else one[rows] for one in arguments]
                    x = _read(stack, parameter, place, partial(experts, *own))
                    weight, gate = stack.matrix(parameter, place).float(), gates[rows, turns, None]
                    x, t = rows_to_fit(x.float(), weight, gate, total[rows], missing.flatten(0, -2)[rows].float())
                    first = int((rows < fitted).sum())  # of those that are fitted, which come first
                    for moments, part in zip(found[place], (slice(first), slice(first, None)), strict=True):
                        moments.add(x[part], t[part])
        return found


def _read(stack: Stack, parameter: nn.Parameter, place: int, call: partial[Tensor]) -> Tensor:
    """What one matrix of a stack reads in a call of its experts, (rows, channels)."""
    seen: list[Tensor] = []

    def show(tensor: str, number: int, x: Tensor) -> None:
        if number == place:
            seen.append(x.flatten(0, -2))

    with Products({parameter: stack.tensor}, show):
        call()
    return torch.cat(seen)
