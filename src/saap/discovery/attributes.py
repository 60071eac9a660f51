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
from saap.core.records import Role, SlicedArgument, UnitAttribute
from saap.discovery.groups import TracedGroup
from saap.discovery.instance import TOKENS, Instance
from saap.models.checkpoint.differences import argument_hook, epsilon_name
from saap.models.structure.linear import contracted_axis

# Some models compute attention in float32 whatever their dtype; a size that does not follow errs by far more.
TOLERANCE = 1e-5
MOST_ATTRIBUTES = 3


def checked(instance: Instance, number: int) -> TracedGroup:
    """The group with what its removal needs; refused if removal cannot be made equal to masking."""
    group = instance.groups[number]
    if group.refusal is not None or group.units == 1:
        return group
    stiff = [path for path in group.scaled_norms if not _can_take_up(instance.model.get_submodule(path))]
    if stiff:
        return group.refuse(
            f"the norm {stiff[0]} has no weight or no epsilon attribute that could take up removed channels"
        )
    try:
        found = (_hidden if group.role is Role.HIDDEN else _in_block)(_Search(instance, number))
    except _NoEffectError:
        return group.refuse(
            "its block computes the same with its units masked, so what their removal needs cannot be tried"
        )
    except Exception as error:  # the model's own code fails in its own way
        return group.refuse(
            f"a small random model of its classes ends with {type(error).__name__}: {first_line(error)}"
        )
    if found is None:
        return group.refuse("removing its units is not the same as masking them, whichever sizes of the module follow")
    return found


def _can_take_up(norm: nn.Module) -> bool:
    return norm._parameters.get("weight") is not None and epsilon_name(norm) is not None


def _hidden(search: _Search) -> TracedGroup | None:
    """Hidden channels: every block at once; attributes of their number follow only where it does not work without."""
    if search.works():
        return search.group
    failure, candidates = search.failure, _of_value(search.model, search.group.units)
    if not search.works(candidates):
        if failure is not None:  # a size that is written down somewhere
            raise failure
        return None
    for name in dict.fromkeys(item.attribute for item in candidates):
        fewer = [item for item in candidates if item.attribute != name]
        if search.works(fewer):
            candidates = fewer
    return replace(search.group, attributes=tuple(candidates))


def _of_value(model: nn.Module, value: int) -> list[UnitAttribute]:
    """Attributes of all modules but linear ones and norms that have this value."""
    return [
        UnitAttribute(module=path, attribute=name, per_unit=1)
        for path, module in model.named_modules()
        if contracted_axis(module) is None and not hasattr(module, "normalized_shape")
        for name, held in vars(module).items()
        if not name.startswith("_") and isinstance(held, int) and not isinstance(held, bool) and held == value
    ]


def _in_block(search: _Search) -> TracedGroup | None:
    group, candidates = search.group, _candidates(search.model, search.group)
    sliced = _sliced_arguments(search.instance, group)
    if group.role is Role.EXPERT:
        # All that say how many experts there are follow, as one way to compute needs what another does not.
        own = (item for item in candidates if not item.attribute.startswith("config."))
        counts = tuple(item for item in own if item.per_unit == 1)
        if counts and search.works(counts):
            return replace(group, attributes=counts)
    if search.works():
        return group
    read = [item for item in candidates if search.is_read(item)]
    for arguments in dict.fromkeys([(), sliced]):
        for count in range(0 if arguments else 1, MOST_ATTRIBUTES + 1):
            for attributes in combinations(read, count):
                if search.works(attributes, arguments):
                    return replace(group, attributes=attributes, sliced_arguments=arguments)
    return None


class _NoEffectError(Exception):
    """Masking the units changes nothing."""


class _Search:
    """Removal of units of one group, with attributes set; compared by the output of its block, or of the last one.

    failure: what the model's code raised in the last removal, if it did.
    """

    def __init__(self, instance: Instance, number: int) -> None:
        self.instance, self.number, self.model = instance, number, instance.model
        self.group = group = instance.groups[number]
        self.failure: Exception | None = None
        self._block = group.block or instance.blocks[-1]
        # Hidden channels also lie in what the block is given.
        self._inputs = None if group.block is None else instance.inputs_of(self._block)
        self._expected: list[tuple[list[int], Tensor]] = []
        units = instance.units_of(number)
        with instance.norms_without_statistic(number):
            self._whole = self._output()
            for kept in _removals(units, group.least):
                consumers_only = group.block is not None and not group.scaled_norms
                with instance.masked(number, kept, consumers_only=consumers_only):
                    self._expected.append((kept, self._output()))
        if group.block is None:
            places = [[units.index(unit) for unit in kept] for kept, _ in self._expected]
            self._expected = [(kept, out[..., at]) for (kept, out), at in zip(self._expected, places, strict=True)]
        elif all(_equal(output, self._whole) for _, output in self._expected):
            raise _NoEffectError

    def _output(self) -> Tensor:
        return self.instance.call(self._block, *(self._inputs or self.instance.inputs_of(self._block)))

    def is_read(self, attribute: UnitAttribute) -> bool:
        """Whether the block computes something else, or fails, when the attribute alone says one unit less."""
        with (
            self.instance.norms_without_statistic(self.number),
            _following(self.model, attribute, self.group.units - 1),
        ):
            try:
                return not _equal(self._output(), self._whole)
            except Exception:  # a size that does not fit any more
                return True

    def works(self, attributes: Sequence[UnitAttribute] = (), arguments: Sequence[SlicedArgument] = ()) -> bool:
        """Whether every removal equals masking when the attributes follow and the arguments are cut."""
        return all(self._agrees(kept, output, attributes, arguments) for kept, output in self._expected)

    def _agrees(
        self,
        kept: list[int],
        expected: Tensor,
        attributes: Sequence[UnitAttribute],
        arguments: Sequence[SlicedArgument],
    ) -> bool:
        with ExitStack() as stack:
            stack.enter_context(self.instance.norms_without_statistic(self.number))
            stack.enter_context(self.instance.removed(self.number, kept))
            for attribute in attributes:
                stack.enter_context(_following(self.model, attribute, len(kept)))
            for sliced in arguments:
                module = self.model.get_submodule(sliced.module)
                hook = argument_hook(module, sliced, self.group.units, kept)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            try:
                return _equal(self._output(), expected)
            except Exception as error:  # sizes that do not fit: not these attributes
                self.failure = error
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


def _sliced_arguments(instance: Instance, group: TracedGroup) -> tuple[SlicedArgument, ...]:
    """The argument with one entry per unit that the innermost module around the members gets, if there is one.

    The batch has one sample more than there are units, so that no other axis can be mistaken for theirs.
    """
    if group.role is not Role.ATTENTION:
        return ()
    samples = group.units + (1 if group.units + 1 != TOKENS else 2)
    around = _common_module(group)
    for path in (around, *_parents(around, group.block or "")):
        module = instance.model.get_submodule(path)
        arguments, keywords = instance.inputs_of(path, samples)
        given = inspect.signature(module.forward).bind(*arguments, **keywords).arguments
        for name, value in given.items():
            place = _unit_axis(value, samples=samples, units=group.units)
            if place is not None:
                return (SlicedArgument(module=path, argument=name, axis=place[0], per_sample=place[1]),)
    return ()


def _unit_axis(value: object, *, samples: int, units: int) -> tuple[int, bool] | None:
    """(axis, whether it runs over samples too) of the axis of `value` that has one entry per unit; None if none has.

    samples: of the batch that the value belongs to, not equal to `units`.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 3:
        return None
    if value.shape[0] in (units, samples * units):
        return 0, value.shape[0] != units
    return (1, False) if value.ndim == 4 and value.shape[1] == units else None


@contextmanager
def _following(model: nn.Module, attribute: UnitAttribute, units: int) -> Iterator[None]:
    """An attribute says this number of units for a while; `config.NAME` in a copy of the module's configuration."""
    module = model.get_submodule(attribute.module)
    config, _, name = attribute.attribute.rpartition(".")
    before = getattr(module, config or name)
    try:
        if config:
            module.config = copy.deepcopy(before)
        setattr(module.config if config else module, name, attribute.value(units))
        yield
    finally:
        setattr(module, config or name, before)
