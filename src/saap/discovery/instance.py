"""A small random float64 model of the same classes, on which removal of units is compared with masking them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saap.core.errors import first_line
from saap.core.records import IntArray, Role
from saap.discovery.groups import TracedGroup
from saap.discovery.reduce import ReducedModel, reduced
from saap.models.checkpoint.modeling_pruned import resize
from saap.models.structure.masking import never_chosen
from saap.models.walk.arguments import without_cache

Kept = Mapping[int, Sequence[int]]

# Rows of an embedding that get values: more than the tokens of a test reach.
FILLED_ROWS = 1024
TOKENS = 5
SMALL_FFN = 8
SMALL_HIDDEN = 16


@contextmanager
def _in_double() -> Iterator[None]:
    """What the model's code makes itself is float64 too for a while, as the instance's weights are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Instance:
    """A reduced model with random weights, in which some groups already have fewer units.

    groups: of the traced model. start: which units each group has, by its number. blocks: paths of the blocks.
    """

    def __init__(self, copy: ReducedModel, groups: Sequence[TracedGroup], start: Kept) -> None:
        twin = reduced(copy.model, copy.blocks, range(len(copy.blocks)))
        self.model, self.blocks, self.groups, self.start = twin.model, twin.blocks, groups, start
        self._sizes = {name: tuple(parameter.shape) for name, parameter in twin.model.named_parameters()}
        self._members = {
            number: _indices_by_axis(group)
            for number, group in enumerate(groups)
            if group.refusal is None or number in start
        }
        self._fill()

    def _fill(self) -> None:
        """Give every parameter its small size and random values; what is never reached stays untouched."""
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.model.named_parameters():
            shape = [len(self._present(name, axis)) for axis in range(parameter.ndim)]
            values = torch.zeros(shape, dtype=torch.float64)
            reached = values if name.startswith(tuple(path + "." for path in self.blocks)) else values[:FILLED_ROWS]
            reached.normal_(generator=generator)
            reached.mul_(shape[-1] ** -0.5 if len(shape) > 1 else 0.3)
            if len(shape) == 1:
                reached.add_(0.5)
            resize(self.model, parameter, values)
        for module in self.model.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, "_experts_implementation"):
                config._experts_implementation = "eager"  # the fused kernels know no float64
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[name] = buffer.double()

    def _present(self, tensor: str, axis: int) -> IntArray:
        """Indices of the original axis that this instance has."""
        stays = np.ones(self._sizes[tensor][axis], dtype=bool)
        for number, kept in self.start.items():
            indices = self._members[number].get((tensor, axis))
            if indices is not None:
                stays[np.delete(indices, list(kept), axis=0)] = False
        return np.flatnonzero(stays)

    def _places(self, number: int, units: Sequence[int]) -> dict[tuple[str, int], Tensor]:
        """Indices in this instance of the given units of a group, by tensor and axis."""
        return {
            (tensor, axis): torch.from_numpy(
                np.searchsorted(self._present(tensor, axis), np.sort(indices[list(units)], axis=None))
            )
            for (tensor, axis), indices in self._members[number].items()
        }

    def units_of(self, number: int) -> list[int]:
        """Units of a group that this instance has."""
        return list(self.start.get(number, range(self.groups[number].units)))

    @contextmanager
    def masked(self, number: int, kept: Sequence[int], *, consumers_only: bool) -> Iterator[None]:
        """Zero the units of a group that are not kept, in all members or in the consumers alone.

        Experts are never chosen instead.
        """
        gone = [unit for unit in self.units_of(number) if unit not in kept]
        if self.groups[number].role is Role.EXPERT:
            routers = {
                self.model.get_parameter(tensor): places
                for (tensor, _), places in self._places(number, gone).items()
                if self.model.get_parameter(tensor).ndim == 2
            }
            with never_chosen(routers):
                yield
            return
        consumed = {(member.tensor, member.axis) for member in self.groups[number].members if member.side == "consumer"}
        with ExitStack() as stack:
            for (tensor, axis), places in self._places(number, gone).items():
                if not consumers_only or (tensor, axis) in consumed:
                    parameter = self.model.get_parameter(tensor)
                    stack.callback(setattr, parameter, "data", parameter.data)
                    parameter.data = parameter.data.index_fill(axis, places, 0.0)
            yield

    @contextmanager
    def removed(self, number: int, kept: Sequence[int]) -> Iterator[None]:
        """Take the units of a group out that are not kept, and nothing else."""
        gone = [unit for unit in self.units_of(number) if unit not in kept]
        with ExitStack() as stack:
            for (tensor, axis), places in self._places(number, gone).items():
                parameter = self.model.get_parameter(tensor)
                stays = torch.ones(parameter.shape[axis], dtype=torch.bool)
                stays[places] = False
                stack.callback(resize, self.model, parameter, parameter.data)
                resize(self.model, parameter, parameter.data.index_select(axis, stays.nonzero().flatten()))
            yield

    @contextmanager
    def norms_without_statistic(self, number: int) -> Iterator[None]:
        """Norms over the group's channels only scale for a while: what their statistic needs is a rule of its own."""

        def scale(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            scaled: Tensor = arguments[0] * module.weight
            return scaled

        handles = [
            self.model.get_submodule(path).register_forward_hook(scale) for path in self.groups[number].scaled_norms
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def tokens(self, samples: int) -> Tensor:
        """Token ids, (samples, TOKENS)."""
        return 2 + torch.arange(samples * TOKENS).reshape(samples, TOKENS) % 5

    @torch.no_grad()
    @_in_double()
    def inputs_of(self, path: str, samples: int = 2) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with which the model calls its module at `path`."""

        def stop(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            raise _ReachedError(arguments, keywords)

        handle = self.model.get_submodule(path).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model(self.tokens(samples), **without_cache(self.model))
        except _ReachedError as reached:
            return reached.arguments, reached.keywords
        finally:
            handle.remove()
        raise RuntimeError(f"{path} was not called")

    @torch.no_grad()
    def output_of(self, path: str) -> Tensor:
        """What the block at `path` gives for a few tokens: the hidden states."""
        arguments, keywords = self.inputs_of(path)
        return self.call(path, arguments, keywords)

    @torch.no_grad()
    @_in_double()
    def call(self, path: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
        """Hidden states that the block at `path` gives for these arguments."""
        output = self.model.get_submodule(path)(*arguments, **keywords)
        hidden: Tensor = output[0] if isinstance(output, (tuple, list)) else output
        return hidden


class _ReachedError(Exception):
    def __init__(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        super().__init__()
        self.arguments, self.keywords = arguments, keywords


class SmallModelError(Exception):
    """No small random model of the classes runs; the text says how it ends."""


def small_instance(copy: ReducedModel, groups: Sequence[TracedGroup]) -> Instance:
    """The smallest instance whose blocks still run: few hidden and FFN channels where their removal just works.

    Raises SmallModelError if not even that with all channels does.
    """
    reason = ""
    ffn = {n: _few(g.units, SMALL_FFN) for n, g in enumerate(groups) if g.role is Role.FFN and g.refusal is None}
    hidden = {n: _few(g.units, SMALL_HIDDEN) for n, g in enumerate(groups) if g.role is Role.HIDDEN}
    for start in ({**ffn, **hidden}, ffn, {}):
        try:
            instance = Instance(copy, groups, start)
            if bool(instance.output_of(instance.blocks[-1]).isfinite().all()):
                return instance
            reason = "gives values that are not finite"
        except Exception as error:  # the model's own code says in its own way that a size does not fit
            reason = f"ends with {type(error).__name__}: {first_line(error)}"
    raise SmallModelError(f"a small random model of its classes {reason}")


def _few(units: int, wanted: int) -> list[int]:
    return sorted({int(unit) for unit in np.linspace(0, units - 1, min(units, wanted))})


def _indices_by_axis(group: TracedGroup) -> dict[tuple[str, int], IntArray]:
    """Indices of each unit by tensor and axis, (units, indices)."""
    found: dict[tuple[str, int], list[IntArray]] = {}
    for member in group.members:
        indices: IntArray = np.array([list(member.rows(unit)) for unit in range(group.units)], dtype=np.int64)
        found.setdefault((member.tensor, member.axis), []).append(indices)
    return {key: np.concatenate(parts, axis=1) for key, parts in found.items()}
