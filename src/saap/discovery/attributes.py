"""What else must change when units leave: found by search on a small instance, where removal must equal masking."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import combinations
from typing import Any

from torch import Tensor, nn

from saap.core.errors import first_line
from saap.core.records import Role, UnitAttribute
from saap.discovery.groups import TracedGroup
from saap.discovery.instance import TOKENS, Instance
from saap.discovery.repeat import Checked
from saap.models.checkpoint.differences import epsilon_name
from saap.models.checkpoint.modeling_pruned import ArgumentSlice
from saap.models.structure.linear import contracted_axis
from saap.models.walk.arguments import unit_axis

# Some models compute attention in float32 whatever their dtype; a size that does not follow errs by far more.
TOLERANCE = 1e-5
MOST_ATTRIBUTES = 3


def checked(instance: Instance, number: int) -> Checked:
    """The group with what its removal needs; refused if removal cannot be made equal to masking."""
    group = instance.groups[number]
    if group.refusal is not None or group.units == 1:
        return Checked(group=group)
    stiff = [path for path in group.scaled_norms if not _can_take_up(instance.model.get_submodule(path))]
    if stiff:
        reason = f"the norm {stiff[0]} has no weight or no epsilon attribute that could take up removed channels"
        return Checked(group=replace(group, refusal=reason))
    try:
        found = _hidden(instance, number) if group.role is Role.HIDDEN else _in_block(instance, number)
    except _NoEffectError:
        reason = "its block computes the same with its units masked, so what their removal needs cannot be tried"
        return Checked(group=replace(group, refusal=reason))
    except Exception as error:  # the model's own code fails in its own way
        reason = f"a small random model of its classes ends with {type(error).__name__}: {first_line(error)}"
        return Checked(group=replace(group, refusal=reason))
    if found is None:
        reason = "removing its units is not the same as masking them, whichever sizes of the module follow"
        return Checked(group=replace(group, refusal=reason))
    return found


def _can_take_up(norm: nn.Module) -> bool:
    return norm._parameters.get("weight") is not None and epsilon_name(norm) is not None


def _hidden(instance: Instance, number: int) -> Checked | None:
    """Hidden channels: every block at once; attributes of their number follow only where it does not work without."""
    group = instance.groups[number]
    try:
        if _hidden_follow(instance, number, ()):
            return Checked(group=group)
        failure = None
    except Exception as error:  # a size that is written down somewhere
        failure = error
    candidates = _of_value(instance.model, group.units)
    if not _hidden_works(instance, number, candidates):
        if failure is not None:
            raise failure
        return None
    for name in dict.fromkeys(item.attribute for item in candidates):
        fewer = [item for item in candidates if item.attribute != name]
        if _hidden_works(instance, number, fewer):
            candidates = fewer
    return Checked(group=group, attributes=tuple(candidates))


def _hidden_works(instance: Instance, number: int, attributes: Sequence[UnitAttribute]) -> bool:
    try:
        return _hidden_follow(instance, number, attributes)
    except Exception:  # sizes that do not fit: not these attributes
        return False


def _hidden_follow(instance: Instance, number: int, attributes: Sequence[UnitAttribute]) -> bool:
    """Whether removal of hidden channels equals masking them when the attributes follow."""
    last = instance.blocks[-1]
    units = instance.units_of(number)
    with instance.norms_without_statistic(number):
        for kept in _removals(units):
            with instance.masked(number, kept, consumers_only=False):
                expected = instance.output_of(last)[..., [units.index(unit) for unit in kept]]
            with ExitStack() as stack:
                stack.enter_context(instance.removed(number, kept))
                for item in attributes:
                    module = instance.model.get_submodule(item.module)
                    stack.enter_context(_changed(module, item.attribute, len(kept)))
                if not _equal(instance.output_of(last), expected):
                    return False
    return True


def _of_value(model: nn.Module, value: int) -> list[UnitAttribute]:
    """Attributes of all modules but linear ones and norms that have this value."""
    return [
        UnitAttribute(module=path, attribute=name, per_unit=1)
        for path, module in model.named_modules()
        if contracted_axis(module) is None and not hasattr(module, "normalized_shape")
        for name, held in vars(module).items()
        if not name.startswith("_") and isinstance(held, int) and not isinstance(held, bool) and held == value
    ]


def _in_block(instance: Instance, number: int) -> Checked | None:
    group = instance.groups[number]
    search = _Search(instance, number)
    sliced = _sliced_arguments(instance, group)
    counts = _counts(search, group)
    if counts and search.works(counts, {}):
        return Checked(group=group, attributes=counts)
    if search.works((), {}):
        return Checked(group=group)
    read = [item for item in search.candidates if search.is_read(item)]
    for arguments in [{}, sliced] if sliced else [{}]:
        for count in range(0 if arguments else 1, MOST_ATTRIBUTES + 1):
            for attributes in combinations(read, count):
                if search.works(attributes, arguments):
                    return Checked(group=group, attributes=attributes, sliced_arguments=tuple(arguments))
    return None


def _counts(search: _Search, group: TracedGroup) -> tuple[UnitAttribute, ...]:
    """Attributes that say how many experts there are: all follow, as one way to compute needs what another does not."""
    if group.role is not Role.EXPERT:
        return ()
    own = (item for item in search.candidates if not item.attribute.startswith("config."))
    return tuple(item for item in own if item.per_unit == 1)


class _NoEffectError(Exception):
    """Masking the units changes nothing."""


class _Search:
    """Removal of units of one group in one block, with candidate attributes set."""

    def __init__(self, instance: Instance, number: int) -> None:
        self.instance, self.number = instance, number
        group = instance.groups[number]
        assert group.block is not None
        self.block = group.block
        self.inputs = instance.inputs_of(group.block)
        self.candidates = _candidates(instance.model, group)
        with instance.norms_without_statistic(number):
            self.whole = instance.call(self.block, *self.inputs)
            self.expected: list[tuple[list[int], Tensor]] = []
            for kept in _removals(instance.units_of(number), group.least):
                with instance.masked(number, kept, consumers_only=not group.scaled_norms):
                    output = instance.call(self.block, *self.inputs)
                self.expected.append((kept, output))
            if all(_equal(output, self.whole) for _, output in self.expected):
                raise _NoEffectError

    def is_read(self, attribute: UnitAttribute) -> bool:
        """Whether the block computes something else, or fails, when the attribute alone says one unit less."""
        module = self.instance.model.get_submodule(attribute.module)
        units = self.instance.groups[self.number].units
        with (
            self.instance.norms_without_statistic(self.number),
            _changed(module, attribute.attribute, attribute.per_unit * (units - 1)),
        ):
            try:
                return not _equal(self.instance.call(self.block, *self.inputs), self.whole)
            except Exception:  # a size that does not fit any more
                return True

    def works(self, attributes: Sequence[UnitAttribute], arguments: dict[str, tuple[str, int, bool]]) -> bool:
        """Whether every removal equals masking when the attributes follow and the arguments are cut."""
        return all(self._difference(kept, output, attributes, arguments) for kept, output in self.expected)

    def _difference(
        self,
        kept: list[int],
        expected: Tensor,
        attributes: Sequence[UnitAttribute],
        arguments: dict[str, tuple[str, int, bool]],
    ) -> bool:
        model, units = self.instance.model, self.instance.groups[self.number].units
        with ExitStack() as stack:
            stack.enter_context(self.instance.norms_without_statistic(self.number))
            stack.enter_context(self.instance.removed(self.number, kept))
            for attribute in attributes:
                module = model.get_submodule(attribute.module)
                stack.enter_context(_changed(module, attribute.attribute, attribute.per_unit * len(kept)))
            for path, (argument, axis, per_sample) in arguments.items():
                module = model.get_submodule(path)
                hook = ArgumentSlice(
                    module, argument=argument, axis=axis, per_sample=per_sample, units=units, kept=kept
                )
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            try:
                return _equal(self.instance.call(self.block, *self.inputs), expected)
            except Exception:  # sizes that do not fit: not these attributes
                return False


def _equal(output: Tensor, expected: Tensor) -> bool:
    if output.shape != expected.shape:
        return False
    return bool((output - expected).abs().max() <= TOLERANCE * max(1.0, float(expected.abs().max())))


def _removals(units: list[int], least: int = 0) -> list[list[int]]:
    """Two choices of kept units: all but one, and one alone, or as many as must stay."""
    few = units[-least:] if least > 1 else [units[-1] if len(units) > 2 else units[1]]
    return [[unit for unit in units if unit != units[1]], few]


def _candidates(model: nn.Module, group: TracedGroup) -> list[UnitAttribute]:
    """Integers that may follow the number of units: of the module around the members, its parts and its parents."""
    around = _common_module(group)
    parts = [f"{around}.{path}" if path else around for path, _ in model.get_submodule(around).named_modules()]
    paths = dict.fromkeys([around, *parts, *_parents(around, group.block or "")])
    found: list[UnitAttribute] = []
    for path in paths:
        module = model.get_submodule(path)
        if contracted_axis(module) is not None or hasattr(module, "normalized_shape"):
            continue
        values = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        config: Any = values.get("config")
        if hasattr(config, "to_dict"):
            values |= {f"config.{name}": value for name, value in config.to_dict().items()}
        found += [
            UnitAttribute(module=path, attribute=name, per_unit=value // group.units)
            for name, value in values.items()
            if isinstance(value, int) and not isinstance(value, bool) and value > 0 and value % group.units == 0
        ]
    return sorted(found, key=lambda item: (item.attribute.startswith("config."), "head" not in item.attribute))


def _common_module(group: TracedGroup) -> str:
    """Path of the innermost module that holds all members."""
    paths = [member.tensor.split(".")[:-1] for member in group.members]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _parents(path: str, block: str) -> Iterator[str]:
    while path != block and "." in path:
        path = path.rpartition(".")[0]
        yield path


def _sliced_arguments(instance: Instance, group: TracedGroup) -> dict[str, tuple[str, int, bool]]:
    """Innermost module around the members that gets a tensor with one entry per unit: path -> argument and its axis."""
    if group.role is not Role.ATTENTION:
        return {}
    samples = group.units + (1 if group.units + 1 != TOKENS else 2)
    around = _common_module(group)
    for path in (around, *_parents(around, group.block or "")):
        module = instance.model.get_submodule(path)
        arguments, keywords = instance.inputs_of(path, samples)
        given = inspect.signature(module.forward).bind(*arguments, **keywords).arguments
        for name, value in given.items():
            place = unit_axis(value, samples=samples, units=group.units)
            if place is not None:
                return {path: (name, *place)}
    return {}


@contextmanager
def _changed(module: nn.Module, name: str, value: int) -> Iterator[None]:
    """Set an attribute for a while; `config.NAME` in a copy of the module's configuration."""
    holder: Any = module
    if name.startswith("config."):
        name = name.removeprefix("config.")
        before = module.config
        holder = copy.deepcopy(before)
        module.config = holder
        try:
            setattr(holder, name, value)
            yield
        finally:
            module.config = before
        return
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
