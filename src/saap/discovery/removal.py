"""What else must change when units are removed: found by search on a small model, where removal must equal masking."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import combinations
from os.path import commonprefix
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saap.core.errors import first_line
from saap.core.records import AxisSlice, CoupledGroup, ModelGraph, ModelRef, Role, SlicedArgument, UnitAttribute
from saap.discovery.blocks import holder, with_blocks
from saap.discovery.groups import TracedGroup, one_of_each_block, slices_of
from saap.models.checkpoint.differences import argument_hook, epsilon_name
from saap.models.checkpoint.modeling_pruned import resize, set_attribute
from saap.models.structure.keep_index import KeepIndex
from saap.models.structure.linear import contracted_axis
from saap.models.structure.masking import masked_units
from saap.models.walk.arguments import unit_axis, without_cache

# Some models compute attention in float32 whatever their dtype; a size that does not follow errs by far more.
TOLERANCE = 1e-5
MOST_ATTRIBUTES = 3
# Rows of an embedding that get values: more than the tokens of a test reach.
FILLED_ROWS = 1024
TOKENS = 5
SMALL_FFN = 8
SMALL_HIDDEN = 16

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def checked(
    traced: nn.Module, blocks: Sequence[str], groups: Sequence[TracedGroup], numbers: Sequence[int]
) -> list[TracedGroup]:
    """The groups of these numbers with what their removal needs; refused where it cannot be made equal to masking.

    Where single units cannot be removed, one unit from each block of a tensor may be.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # for what the model's code makes itself
    try:
        with torch.no_grad():
            small, reason = _smallest(traced, blocks, groups)
            found = [groups[n].refuse(reason) if small is None else _checked(small, n, groups[n]) for n in numbers]
    finally:
        torch.set_default_dtype(before)
    for place, number in enumerate(numbers):
        joined = one_of_each_block(groups[number])
        if joined is not None and found[place].refusal and not joined.refusal:
            changed = [joined if place == number else group for place, group in enumerate(groups)]
            (again,) = checked(traced, blocks, changed, [number])
            found[place] = found[place] if again.refusal else again
    return found


def _smallest(
    traced: nn.Module, blocks: Sequence[str], groups: Sequence[TracedGroup]
) -> tuple[_SmallModel | None, str]:
    """The smallest model whose blocks still run: few hidden and FFN channels where their removal just works.

    None and the reason if not even that with all channels does.
    """
    reason = ""
    ffn = {n: SMALL_FFN for n, group in enumerate(groups) if group.role is Role.FFN and not group.refusal}
    hidden = {n: SMALL_HIDDEN for n, group in enumerate(groups) if group.role is Role.HIDDEN}
    for units in ({**ffn, **hidden}, ffn, {}):
        try:
            small = _SmallModel(traced, blocks, groups, units)
            if bool(small.output_of(blocks[-1]).isfinite().all()):
                return small, ""
            reason = "gives values that are not finite"
        except Exception as error:  # the model's own code says in its own way that a size does not fit
            reason = f"ends with {type(error).__name__}: {first_line(error)}"
    return None, f"a small random model of its classes {reason}"


class _SmallModel:
    """A traced model with random float64 weights, in which some groups have fewer units.

    groups: of the traced model. units: how many of a group's units it has, by its number; all of the others.
    """

    def __init__(
        self, traced: nn.Module, blocks: Sequence[str], groups: Sequence[TracedGroup], units: Mapping[int, int]
    ) -> None:
        self.model, self.blocks = with_blocks(traced, blocks, range(len(blocks))), tuple(blocks)
        kept = [_few(group.units, units.get(number, group.units)) for number, group in enumerate(groups)]
        shapes = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        index = KeepIndex(shapes, zip(groups, kept, strict=True))
        self.shapes = index.shapes
        self.groups = [_renumbered(group, few, index) for group, few in zip(groups, kept, strict=True)]
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.model.named_parameters():
            shape = self.shapes[name]
            values = torch.zeros(shape, dtype=torch.float64)
            reached = values if holder(self.blocks, name) >= 0 else values[:FILLED_ROWS]  # the others stay untouched
            reached.normal_(generator=generator)
            reached.mul_(shape[-1] ** -0.5 if len(shape) > 1 else 0.3).add_(0.0 if len(shape) > 1 else 0.5)
            resize(self.model, parameter, values)
        for module in self.model.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, "_experts_implementation"):
                config._experts_implementation = "eager"  # the fused kernels know no float64
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[name] = buffer.double()

    def arguments_of(self, path: str, samples: int = 2) -> Arguments:
        """Arguments with which the model calls its module at `path`, for a few tokens in so many samples."""

        def stop(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            raise _ReachedError(arguments, keywords)

        tokens = 2 + torch.arange(samples * TOKENS).reshape(samples, TOKENS) % 5
        handle = self.model.get_submodule(path).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model(tokens, **without_cache(self.model))
        except _ReachedError as reached:
            return reached.args
        finally:
            handle.remove()
        raise RuntimeError(f"{path} was not called")

    def output_of(self, path: str, given: Arguments | None = None) -> Tensor:
        """Hidden states that the block at `path` returns. given: its arguments, else those of the model's forward."""
        arguments, keywords = given or self.arguments_of(path)
        output = self.model.get_submodule(path)(*arguments, **keywords)
        hidden: Tensor = output[0] if isinstance(output, (tuple, list)) else output
        return hidden


def _few(units: int, wanted: int) -> list[int]:
    return sorted({int(unit) for unit in np.linspace(0, units - 1, min(units, wanted))})


def _renumbered(group: TracedGroup, units: list[int], index: KeepIndex) -> TracedGroup:
    """The group with some of its units alone, where they lie once only the index's channels are there."""
    if group.refusal:
        return group
    members: list[AxisSlice] = []
    for member in group.members:
        places = np.searchsorted(index.axis(member.tensor, member.axis).kept(), member.indices(units))
        slices = slices_of(places.reshape(len(units), -1), member.tensor, member.axis, member.side)
        if slices is None:
            raise ValueError(f"its units have no regular places in {member.tensor}")
        members += slices
    return replace(group, units=len(units), members=tuple(members))


class _ReachedError(Exception):
    """Ends a forward at a module; its arguments are the module's."""


def _checked(small: _SmallModel, number: int, group: TracedGroup) -> TracedGroup:
    if group.refusal or group.units == 1:
        return group
    norms = {path: small.model.get_submodule(path) for path in group.scaled_norms}
    for path, norm in norms.items():
        if norm._parameters.get("weight") is None or epsilon_name(norm) is None:
            return group.refuse(
                f"the norm {path} has no weight or no epsilon attribute that could take up removed channels"
            )
    try:
        with _without_statistic(norms.values()):
            trial = _Trial(small, number, group)
            if trial.without_effect:
                return group.refuse(
                    "its block computes the same with its units masked, so what their removal needs cannot be tried"
                )
            found = _hidden(trial) if group.layer < 0 else _in_block(trial)
    except Exception as error:  # the model's own code fails in its own way
        return group.refuse(
            f"a small random model of its classes ends with {type(error).__name__}: {first_line(error)}"
        )
    reason = "removing its units is not the same as masking them, whichever sizes of the module follow"
    return found or group.refuse(reason)


@contextmanager
def _without_statistic(norms: Iterable[nn.Module]) -> Iterator[None]:
    """Norms only scale for a while: what their statistic needs is a rule of its own."""

    def scale(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        return arguments[0] * module.weight  # type: ignore[operator]

    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_hook(scale).remove)
        yield


class _Trial:
    """Removal of units of one group, with attributes set; compared by the output of its block, or of the last one.

    group: of the traced model. without_effect: whether masking the units changes nothing. failure: what the model's
    code raised in the last removal, if it did.
    """

    def __init__(self, small: _SmallModel, number: int, group: TracedGroup) -> None:
        self.small, self.group = small, group
        self.failure: Exception | None = None
        found = [item for item in small.groups[number].settled("group", group.layer) if isinstance(item, CoupledGroup)]
        ref = ModelRef(source="", config_digest="", weights_digest="")
        self._graph = ModelGraph(model=ref, blocks=small.blocks, groups=tuple(found), shapes=small.shapes)
        hidden, units = group.layer < 0, list(range(found[0].units))
        self._block = small.blocks[group.layer]
        self._given = None if hidden else small.arguments_of(self._block)  # hidden channels lie in these too
        self._whole = self._output()
        self._expected: list[tuple[list[int], Tensor]] = []
        for kept in (units[:1] + units[2:], units[-max(1, group.least) :]):
            with masked_units(small.model, self._graph, self._keep(kept)):
                output = self._output()
            self._expected.append((kept, output[..., kept] if hidden else output))
        self.without_effect = not hidden and all(_equal(output, self._whole) for _, output in self._expected)

    def _keep(self, kept: list[int]) -> dict[str, tuple[int, ...]]:
        return {group.name: tuple(kept) for group in self._graph.groups}

    def _output(self) -> Tensor:
        return self.small.output_of(self._block, self._given)

    def is_read(self, attribute: UnitAttribute) -> bool:
        """Whether the block computes something else, or fails, when the attribute alone says one unit less."""
        with _following(self.small.model, attribute, self.group.units - 1):
            try:
                return not _equal(self._output(), self._whole)
            except Exception:  # a size that does not fit any more
                return True

    def works(self, attributes: Sequence[UnitAttribute] = (), arguments: Sequence[SlicedArgument] = ()) -> bool:
        """Whether every removal equals masking when the attributes follow and the arguments are cut."""
        try:
            return all(
                _equal(self._removed(kept, attributes, arguments), expected) for kept, expected in self._expected
            )
        except Exception as error:  # sizes that do not fit: not these attributes
            self.failure = error
            return False

    def _removed(
        self, kept: list[int], attributes: Sequence[UnitAttribute], arguments: Sequence[SlicedArgument]
    ) -> Tensor:
        """Output with the kept units alone."""
        model = self.small.model
        with ExitStack() as stack:
            for tensor, axes in KeepIndex.of(self._graph, self._keep(kept)).items():
                weight = model.get_parameter(tensor)
                for axis in axes.values():
                    stack.callback(resize, model, weight, weight.data)
                    resize(model, weight, axis.select(weight.data))
            for attribute in attributes:
                stack.enter_context(_following(model, attribute, len(kept)))
            for sliced in arguments:
                module = model.get_submodule(sliced.module)
                hook = argument_hook(module, sliced, self.group.units, kept)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            return self._output()


def _equal(output: Tensor, expected: Tensor) -> bool:
    if output.shape != expected.shape:
        return False
    return bool((output - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max())))


@contextmanager
def _following(model: nn.Module, attribute: UnitAttribute, units: int) -> Iterator[None]:
    """An attribute says this number of units for a while; `config.NAME` in the module's own configuration."""
    module = model.get_submodule(attribute.module)
    name = attribute.attribute.partition(".")[0]
    before = getattr(module, name)
    set_attribute(module, attribute.attribute, attribute.value(units))
    try:
        yield
    finally:
        setattr(module, name, before)


def _hidden(trial: _Trial) -> TracedGroup | None:
    """Hidden channels: every block at once; attributes of their number follow only where it does not work without."""
    if trial.works():
        return trial.group
    failure, model = trial.failure, trial.small.model
    integers = _integers(model, [path for path, _ in model.named_modules()], trial.group.units)
    candidates = [item for item in integers if item.per_unit == 1 and not item.attribute.startswith("config.")]
    if not trial.works(candidates):
        if failure is not None:  # a size that is written down somewhere
            raise failure
        return None
    for name in dict.fromkeys(item.attribute for item in candidates):
        fewer = [item for item in candidates if item.attribute != name]
        if trial.works(fewer):
            candidates = fewer
    return replace(trial.group, attributes=tuple(candidates))


def _in_block(trial: _Trial) -> TracedGroup | None:
    """Units inside a block: as few attributes as do follow, of the modules around the members and their parts."""
    group, model = trial.group, trial.small.model
    around = _around(group, trial.small.blocks)
    parts = [f"{around[0]}.{path}" for path, _ in model.get_submodule(around[0]).named_modules() if path]
    candidates = _integers(model, dict.fromkeys([around[0], *parts, *around]), group.units)
    candidates.sort(key=lambda item: (item.attribute.startswith("config."), "head" not in item.attribute))
    sliced = _sliced_arguments(trial.small, group, around)
    if group.role is Role.EXPERT:
        # All that say how many experts there are follow, as one way to compute needs what another does not.
        own = (item for item in candidates if not item.attribute.startswith("config."))
        counts = tuple(item for item in own if item.per_unit == 1)
        if counts and trial.works(counts):
            return replace(group, attributes=counts)
    if trial.works():
        return group
    read = [item for item in candidates if trial.is_read(item)]
    for arguments in dict.fromkeys([(), sliced]):
        for count in range(0 if arguments else 1, MOST_ATTRIBUTES + 1):
            for attributes in combinations(read, count):
                if trial.works(attributes, arguments):
                    return replace(group, attributes=attributes, sliced_arguments=arguments)
    return None


def _around(group: TracedGroup, blocks: Sequence[str]) -> list[str]:
    """Paths of the innermost module that holds all members, and of those around it up to its block."""
    shared = commonprefix([member.tensor.split(".")[:-1] for member in group.members])  # noqa: RUF071 - of lists
    return [".".join(shared[:count]) for count in range(len(shared), blocks[group.layer].count("."), -1)]


def _integers(model: nn.Module, paths: Iterable[str], units: int) -> list[UnitAttribute]:
    """Integers that `units` divides, of modules and of their configurations; not of linear modules and norms."""
    found: list[UnitAttribute] = []
    for path in paths:
        module = model.get_submodule(path)
        if contracted_axis(module) is not None or hasattr(module, "normalized_shape"):
            continue
        values = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        if hasattr(values.get("config"), "to_dict"):
            values |= {f"config.{name}": value for name, value in values["config"].to_dict().items()}
        found += [
            UnitAttribute(module=path, attribute=name, per_unit=value // units)
            for name, value in values.items()
            if isinstance(value, int) and not isinstance(value, bool) and value > 0 and value % units == 0
        ]
    return found


def _sliced_arguments(small: _SmallModel, group: TracedGroup, around: Sequence[str]) -> tuple[SlicedArgument, ...]:
    """The argument with one entry per unit that the innermost module around the members gets, if there is one.

    The batch has one sample more than there are units, so that no other axis can be mistaken for theirs.
    """
    if group.role is not Role.ATTENTION:
        return ()
    samples = group.units + (1 if group.units + 1 != TOKENS else 2)
    for path in around:
        arguments, keywords = small.arguments_of(path, samples)
        given = inspect.signature(small.model.get_submodule(path).forward).bind(*arguments, **keywords).arguments
        for name, value in given.items():
            place = unit_axis(value, samples=samples, units=group.units)
            if place is not None:
                return (SlicedArgument(module=path, argument=name, axis=place[0], per_sample=place[1]),)
    return ()
