"""Search for what else must change when units are removed: on a small model, removal must equal masking."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from os.path import commonprefix
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saap.core.errors import failure_of
from saap.core.records import AxisSlice, ModelGraph, ModelRef, Role, SlicedArgument, UnitAttribute
from saap.discovery.blocks import holder, with_blocks
from saap.discovery.experts import expert_buffers
from saap.discovery.groups import TracedGroup, one_of_each_block, slices_of
from saap.models.checkpoint.modeling_pruned import ConfigView, resize, set_attribute
from saap.models.checkpoint.pruned_structure import epsilon_name
from saap.models.structure.cut import can_be_empty, cut_groups
from saap.models.structure.keep_index import KeepIndex
from saap.models.structure.linear import contracted_axis, embedding_of
from saap.models.structure.masking import masked
from saap.models.walk.observer import StopForwardError, hooked
from saap.models.walk.walker import without_cache

# Some models compute attention in float32 in any dtype; the error of a wrong size is far larger.
TOLERANCE = 1e-5
MOST_ATTRIBUTES = 3
# Rows of an embedding that exist, or get values: more than the token ids of a test.
FILLED_ROWS = 1024
TOKENS = 5
SMALL_FFN = 8
SMALL_HIDDEN = 16
_SMALL = "a small random model of its classes"


def checked(
    traced: nn.Module, blocks: Sequence[str], groups: Sequence[TracedGroup], numbers: Sequence[int]
) -> list[TracedGroup]:
    """Complete groups with what their removal needs; rejected if removal cannot be made equal to masking.

    If single units cannot be removed, units with one part in each block of a tensor are tried.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # for tensors that the model's code creates
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
    """The smallest model that runs, if possible with few hidden and FFN channels; or None and the reason."""
    reason = ""
    ffn = {n: SMALL_FFN for n, group in enumerate(groups) if group.role is Role.FFN and not group.refusal}
    hidden = {n: SMALL_HIDDEN for n, group in enumerate(groups) if group.role is Role.HIDDEN}
    for units in ({**ffn, **hidden}, ffn, {}):
        try:
            small = _SmallModel(traced, blocks, groups, units)
            if bool(_called(small.model, blocks[-1])[-1].isfinite().all()):
                return small, ""
            reason = "returns values that are not finite"
        except Exception as error:  # the model's own code may raise any error for a wrong size
            reason = _ending(error)
    return None, f"{_SMALL} {reason}"


def _ending(error: Exception) -> str:
    return f"ends with {failure_of(error)}"


class _SmallModel:
    """A traced model with random float64 weights, in which some groups have fewer units.

    groups: of the traced model. units: number of units by group index; groups that are not listed have all units.
    """

    def __init__(
        self, traced: nn.Module, blocks: Sequence[str], groups: Sequence[TracedGroup], units: Mapping[int, int]
    ) -> None:
        self.model, self.blocks = with_blocks(traced, blocks, range(len(blocks))), tuple(blocks)
        sizes = [min(group.units, units.get(number, group.units)) for number, group in enumerate(groups)]
        every = [np.linspace(0, one.units - 1, size) for one, size in zip(groups, sizes, strict=True)]
        kept = [np.unique(places.astype(int)).tolist() for places in every]
        shapes = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        index = KeepIndex(shapes, zip(groups, kept, strict=True))
        tables = _token_tables(self.model)
        self.shapes = {name: (FILLED_ROWS, *one[1:]) if name in tables else one for name, one in index.shapes.items()}
        self.groups = [_renumbered(group, few, index) for group, few in zip(groups, kept, strict=True)]
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.model.named_parameters():
            shape = self.shapes[name]
            values = torch.zeros(shape, dtype=torch.float64)
            reached = values if holder(self.blocks, name) >= 0 else values[:FILLED_ROWS]  # other rows stay untouched
            reached.normal_(generator=generator)
            reached.mul_(shape[-1] ** -0.5 if len(shape) > 1 else 0.3).add_(0.0 if len(shape) > 1 else 0.5)
            resize(self.model, parameter, values)
        for module in self.model.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, "_experts_implementation"):
                config._experts_implementation = "eager"  # the fused kernels do not support float64
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[name] = buffer.double()

    def copied(self) -> nn.Module:
        """A copy to be changed: own parameters with the same values, everything else may be shared."""
        shared = [*self.model.buffers(), getattr(self.model, "config", None)]
        memo: dict[int, Any] = {id(one): one for one in shared}
        memo |= {id(one): nn.Parameter(one.data, requires_grad=False) for one in self.model.parameters()}
        return copy.deepcopy(self.model, memo)


def _token_tables(model: nn.Module) -> set[str]:
    """Parameters with more rows than a test needs, one for each token; their modules are prepared to lose the others.

    Of a large vocabulary they would be most of the small model's memory.
    """
    rows: list[nn.Parameter] = []
    for module in (embedding_of(model, "input"), embedding_of(model, "output")):
        rows += [] if module is None else [one for one in module.parameters(recurse=False) if len(one) > FILLED_ROWS]
        if getattr(module, "padding_idx", None) is not None:
            module.padding_idx = None  # type: ignore[union-attr]  # it may be one of them
    return {name for name, parameter in model.named_parameters() if any(parameter is one for one in rows)}


def _called(model: nn.Module, path: str, samples: int = 2) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """Arguments, keywords and output of the module at `path` in a forward pass on a few tokens."""

    def stop(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        raise StopForwardError(arguments, keywords, output[0] if isinstance(output, (tuple, list)) else output)

    tokens = 2 + torch.arange(samples * TOKENS).reshape(samples, TOKENS) % 5
    try:
        with hooked({model.get_submodule(path): stop}, with_kwargs=True):
            model(tokens, **without_cache(model))
    except StopForwardError as reached:
        return reached.args
    raise RuntimeError(f"{path} was not called")


def _renumbered(group: TracedGroup, units: list[int], index: KeepIndex) -> TracedGroup:
    """The group with some of its units only, at their positions after all other channels are removed."""
    if group.refusal:
        return group
    members: list[AxisSlice] = []
    for member in group.members:
        places = np.searchsorted(index.axis(member.tensor, member.axis).kept(), member.indices(units))
        slices = slices_of(places.reshape(len(units), -1), member.tensor, member.axis, member.side)
        if slices is None:
            raise ValueError(f"its units are not regularly spaced in {member.tensor}")
        members += slices
    return replace(group, units=len(units), members=tuple(members))


def _checked(small: _SmallModel, number: int, group: TracedGroup) -> TracedGroup:
    if group.refusal or group.units == 1:
        return group
    norms = {path: small.model.get_submodule(path) for path in group.scaled_norms}
    for path, norm in norms.items():
        if norm._parameters.get("weight") is None or epsilon_name(norm) is None:
            return group.refuse(
                f"the norm {path} has no weight or no epsilon attribute to compensate for removed channels"
            )
    try:
        buffers = _router_buffers(small, group)
        with hooked(dict.fromkeys(norms.values(), _only_scale)):  # their statistic has its own rule
            for added in dict.fromkeys([buffers, ()]):
                trial = _Trial(small, number, replace(group, buffers=added))
                if trial.without_effect:
                    return group.refuse(
                        "masking its units does not change the output of its block, so their removal cannot be tested"
                    )
                found = _hidden(trial) if group.layer < 0 else _in_block(trial)
                if found is not None:
                    alone = group.layer >= 0 and not (group.parts or group.shares)
                    emptied = not alone or can_be_empty(small.model, found)
                    return found if emptied else replace(found, least=max(1, found.least))
    except Exception as error:  # the model's own code may raise any error
        return group.refuse(f"{_SMALL} {_ending(error)}")
    reason = "removing its units is not the same as masking them, whichever sizes of the module are adapted"
    return group.refuse(reason)


def _router_buffers(small: _SmallModel, group: TracedGroup) -> tuple[AxisSlice, ...]:
    """Buffers around whole experts that have one entry for each."""
    if group.role is not Role.EXPERT:
        return ()
    path, groups = _around(group, small.blocks)[0], max(group.shares, 1)
    return expert_buffers(small.model.get_submodule(path), path, group.units * groups, groups)


def _only_scale(norm: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
    return arguments[0] * norm.weight  # type: ignore[operator]


class _Trial:
    """Removal of units of one group, with attributes set; compared by the output of its block, or of the last one.

    group: of the traced model. without_effect: whether masking the units changes nothing. failure: exception of the
    model's code in the last removal, if any.
    """

    def __init__(self, small: _SmallModel, number: int, group: TracedGroup) -> None:
        self.small, self.group = small, group
        self.failure: Exception | None = None
        self._groups = tuple(replace(small.groups[number], buffers=group.buffers).settled())
        ref = ModelRef(source="", config_digest="", weights_digest="")
        graph = ModelGraph(model=ref, blocks=small.blocks, groups=self._groups, shapes=small.shapes)
        hidden, units = group.layer < 0, tuple(range(self._groups[0].units))
        self._block = small.blocks[group.layer]
        self._whole = self._output(small.model)
        self._expected: list[tuple[dict[str, tuple[int, ...]], Tensor]] = []
        least = max(1, group.least)
        # Of experts, both the first and the last ones: a router may select only some of them.
        fewest = [units[-least:], units[:least]] if group.role is Role.EXPERT else [units[-least:]]
        for kept in (units[:1] + units[2:], *fewest):
            keep = {one.name: kept for one in self._groups}
            with masked(small.model, graph, keep):
                output = self._output(small.model)
            self._expected.append((keep, output[..., kept] if hidden else output))
        self.without_effect = not hidden and all(_equal(output, self._whole) for _, output in self._expected)

    def _output(self, model: nn.Module) -> Tensor:
        return _called(model, self._block)[-1]

    def is_read(self, attribute: UnitAttribute) -> bool:
        """Whether the block computes something else, or fails, if only the attribute is one unit less."""
        model = self.small.copied()
        set_attribute(model.get_submodule(attribute.module), attribute.attribute, attribute.value(self.group.units - 1))
        try:
            return not _equal(self._output(model), self._whole)
        except Exception:  # a size mismatch
            return True

    def works(self, attributes: Sequence[UnitAttribute] = (), arguments: Sequence[SlicedArgument] = ()) -> bool:
        """Whether every removal equals masking when the attributes are adapted and the arguments are cut."""
        groups = [
            replace(one, attributes=tuple(attributes), sliced_arguments=tuple(arguments), scaled_norms=())
            for one in self._groups
        ]
        try:
            for keep, expected in self._expected:
                cut_groups(model := self.small.copied(), groups, keep)
                if not _equal(self._output(model), expected):
                    return False
            return True
        except Exception as error:  # size mismatch: wrong attributes
            self.failure = error
            return False


def _equal(output: Tensor, expected: Tensor) -> bool:
    near = TOLERANCE * max(1.0, float(expected.abs().max()))
    return output.shape == expected.shape and bool((output - expected).abs().max() <= near)


def _hidden(trial: _Trial) -> TracedGroup | None:
    """Hidden channels, in every block at once; attributes with their number are adapted only if needed."""
    if trial.works():
        return trial.group
    failure, model = trial.failure, trial.small.model
    integers = _integers(model, [path for path, _ in model.named_modules()], trial.group.units)
    candidates = [item for item in integers if item.per_unit == 1 and not item.attribute.startswith("config.")]
    if not trial.works(candidates):
        if failure is not None:  # some attribute has the size
            raise failure
        return None
    for name in dict.fromkeys(item.attribute for item in candidates):
        fewer = [item for item in candidates if item.attribute != name]
        if trial.works(fewer):
            candidates = fewer
    return replace(trial.group, attributes=tuple(candidates))


def _in_block(trial: _Trial) -> TracedGroup | None:
    """Units inside a block: the fewest attributes to adapt, of the modules around the members and their submodules."""
    group, model = trial.group, trial.small.model
    around = _around(group, trial.small.blocks)
    inside = [path for path, _ in model.named_modules() if f"{path}.".startswith(f"{around[0]}.")]
    candidates = _integers(model, [*inside, *around[1:]], group.units)
    candidates.sort(key=lambda item: (item.attribute.startswith("config."), "head" not in item.attribute))
    sliced = _sliced_arguments(trial.small, group, around)
    if group.role is Role.EXPERT:
        # All attributes with the number of experts are adapted: each implementation of experts reads others.
        own = (item for item in candidates if not item.attribute.startswith("config."))
        counts = tuple(item for item in own if item.per_unit == max(group.shares, 1))
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
    """Paths of the innermost module that contains all members, and of its parents up to the block."""
    shared = commonprefix([member.tensor.split(".")[:-1] for member in group.members])  # noqa: RUF071 - of lists
    return [".".join(shared[:count]) for count in range(len(shared), blocks[group.layer].count("."), -1)]


def _integers(model: nn.Module, paths: Iterable[str], units: int) -> list[UnitAttribute]:
    """Integer attributes that `units` divides, of modules and their configurations, except linear modules and norms."""
    found: list[UnitAttribute] = []
    for path in paths:
        module = model.get_submodule(path)
        if contracted_axis(module) is not None or hasattr(module, "normalized_shape"):
            continue
        values = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        config: Any = values.get("config")
        if hasattr(config, "to_dict"):
            own = vars(config) if isinstance(config, ConfigView) else {}  # of a block that was pruned before
            values |= {f"config.{name}": value for name, value in {**config.to_dict(), **own}.items()}
        found += [
            UnitAttribute(module=path, attribute=name, per_unit=value // units)
            for name, value in values.items()
            if isinstance(value, int) and not isinstance(value, bool) and value > 0 and value % units == 0
        ]
    return found


def _sliced_arguments(small: _SmallModel, group: TracedGroup, around: Sequence[str]) -> tuple[SlicedArgument, ...]:
    """The argument with one entry per unit that the innermost module around the members receives, if any."""
    units = group.units
    samples = units + (1 if units + 1 != TOKENS else 2)  # no other axis may have the size of the units
    for path in around if group.role is Role.ATTENTION else ():
        arguments, keywords, _ = _called(small.model, path, samples)
        given = inspect.signature(small.model.get_submodule(path).forward).bind(*arguments, **keywords).arguments
        for name, value in given.items():
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 3:
                continue
            if value.shape[0] in (units, samples * units):
                return (SlicedArgument(module=path, argument=name, axis=0, per_sample=value.shape[0] != units),)
            if value.ndim == 4 and value.shape[1] == units:
                return (SlicedArgument(module=path, argument=name, axis=1, per_sample=False),)
    return ()
