"""A small random float64 model of the same classes, on which removal of units is compared with masking them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saap.core.errors import first_line
from saap.core.records import AxisSlice, Role, Side
from saap.discovery.groups import TracedGroup
from saap.discovery.reduce import ReducedModel, reduced
from saap.models.checkpoint.modeling_pruned import resize
from saap.models.structure.keep_index import KeepIndex
from saap.models.structure.masking import never_chosen
from saap.models.walk.walker import without_cache

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
        self._shapes = {name: tuple(parameter.shape) for name, parameter in twin.model.named_parameters()}
        self._present = self._index(start)
        self._fill()

    def _index(self, kept: Kept) -> KeepIndex:
        """What stays of the traced model's tensors. kept: by number of the group."""
        return KeepIndex(self._shapes, ((self.groups[number], units) for number, units in kept.items()))

    def _fill(self) -> None:
        """Give every parameter its small size and random values; what is never reached stays untouched."""
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.model.named_parameters():
            shape = self._present.shape(name)
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

    def _staying(self, number: int, kept: Sequence[int]) -> Iterator[tuple[AxisSlice, nn.Parameter, Tensor]]:
        """A member for each axis of a group, its parameter, and the places in this instance that stay."""
        index = self._index({**self.start, number: kept})
        for (tensor, axis), member in {(one.tensor, one.axis): one for one in self.groups[number].members}.items():
            here = self._present.axis(tensor, axis).kept()
            places = np.searchsorted(here, index.axis(tensor, axis).kept())
            yield member, self.model.get_parameter(tensor), torch.from_numpy(places)

    def units_of(self, number: int) -> list[int]:
        """Units of a group that this instance has."""
        return list(self.start.get(number, range(self.groups[number].units)))

    @contextmanager
    def masked(self, number: int, kept: Sequence[int], *, consumers_only: bool) -> Iterator[None]:
        """Zero the units of a group that are not kept, in all members or in the consumers alone.

        Experts are never chosen instead.
        """
        never: dict[nn.Parameter, Tensor] = {}
        with ExitStack() as stack:
            for member, parameter, places in self._staying(number, kept):
                gone = torch.ones(parameter.shape[member.axis], dtype=torch.bool).index_fill(0, places, False)
                if self.groups[number].role is Role.EXPERT:
                    if parameter.ndim == 2:
                        never[parameter] = gone.nonzero().flatten()
                elif not consumers_only or member.side is Side.CONSUMER:
                    stack.callback(setattr, parameter, "data", parameter.data)
                    parameter.data = parameter.data.index_fill(member.axis, gone.nonzero().flatten(), 0.0)
            stack.enter_context(never_chosen(never))
            yield

    @contextmanager
    def removed(self, number: int, kept: Sequence[int]) -> Iterator[None]:
        """Take the units of a group out that are not kept, and nothing else."""
        with ExitStack() as stack:
            for member, parameter, places in self._staying(number, kept):
                stack.callback(resize, self.model, parameter, parameter.data)
                resize(self.model, parameter, parameter.data.index_select(member.axis, places))
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
