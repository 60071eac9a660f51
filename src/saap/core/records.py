"""Records that the stages exchange: frozen, typed, each with a digest. No torch and no mathematics.

A record is identified by `digest`, the sha256 of its canonical JSON (arrays by their bytes). A stage raises
StaleInputError for a record made for another input (see `require_same`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from saap.core.errors import StaleInputError
from saap.core.roles import Layout as Layout
from saap.core.roles import Role as Role

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Value = TypeVar("Value")


class Side(StrEnum):
    """Whether a member's axis produces the group's channels or contracts over them."""

    PRODUCER = "producer"
    CONSUMER = "consumer"


# A later field that most records do not use: the digest ignores it at its default.
_WHERE_USED = {"digest": "where used"}


def canonical(value: Any) -> Any:
    """JSON-able form of a record, as input of its digest; arrays become their shape, type and sha256."""
    if isinstance(value, np.ndarray):
        raw = np.ascontiguousarray(value)
        return [list(raw.shape), str(raw.dtype), hashlib.sha256(raw.tobytes()).hexdigest()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: canonical(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if f.compare and (f.metadata != _WHERE_USED or getattr(value, f.name) != f.default)
        }
    if isinstance(value, Mapping):
        return {str(key): canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [canonical(item) for item in value]
    return value


def digest_of(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of `value`."""
    text = json.dumps(canonical(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def require_same(what: str, *, expected: str, found: str) -> None:
    """Raise StaleInputError unless the two digests are equal."""
    if expected != found:
        raise StaleInputError(
            f"{what} was made for digest {expected[:12]}, but this one is {found[:12]}",
            "Run the earlier stage again for this input, or delete the stale stage file",
        )


class Digested:
    """Mixin: `digest` of a frozen dataclass."""

    __slots__ = ()

    @property
    def digest(self) -> str:
        """sha256 (hex) of the record's canonical JSON."""
        return digest_of(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRef(Digested):
    """Identity of a model: origin of the weights, and digests of configuration and weights.

    Records compare only these digests, so the stage files of a moved folder stay valid.
    """

    source: str = field(compare=False)
    revision: str | None = field(default=None, compare=False)
    config_digest: str
    weights_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisSlice:
    """Positions of a group's units along one axis of one tensor.

    Unit u covers `width` consecutive indices. The first indices advance by `stride` from `offset`. In a tensor made of
    blocks (fused projections split over heads), they advance by `jump` after every `period` units instead. part: index
    along axis 0 if the tensor stacks several matrices (experts).
    """

    tensor: str
    axis: int
    side: Side
    offset: int
    width: int
    stride: int
    period: int = 0
    jump: int = 0
    part: int | None = field(default=None, metadata=_WHERE_USED)

    def indices(self, units: Iterable[int] | IntArray) -> IntArray:
        """The indices of all `units` along the axis, unit by unit."""
        numbers = units if isinstance(units, np.ndarray) else np.fromiter(units, np.int64)
        block, place = divmod(numbers, self.period) if self.period else (0, numbers)
        starts = self.offset + place * self.stride + block * self.jump
        return (starts[:, None] + np.arange(self.width)).ravel()

    def rows(self, unit: int) -> range:
        """The indices of `unit` along the axis."""
        first = int(self.indices([unit])[0])
        return range(first, first + self.width)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitAttribute:
    """An integer attribute of a module that must follow the number of kept units.

    attribute: its name; "config.NAME" means the module's own copy of the configuration.
    """

    module: str
    attribute: str
    per_unit: int

    def value(self, kept: int) -> int:
        """Its value for a number of kept units. With none kept, modules between the constants see one unit of zeros."""
        return self.per_unit * max(kept, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicedArgument:
    """A tensor argument with one entry per unit (ALiBi), to be cut to the kept units at each call of a module.

    axis: of the units. per_sample: the axis has the units of each sample, sample by sample.
    """

    module: str
    argument: str
    axis: int
    per_sample: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CoupledGroup(Digested):
    """Weight slices that must be removed together: `units` of them, numbered 0..units-1, over all `members`.

    layer: index of the decoder block, -1 for groups of the whole model. name: unique, e.g. "layers.3.ffn".
    attributes: integers that follow the number of kept units. scaled_norms: modules that take the RMS over the group's
    axis; removal equals masking only if weight x (kept/n)^-0.5 and eps x n/kept.
    bundle: groups of one bundle are parts of the same tensors, or share the heads of one module evenly. All of them
    keep the same number of units, but each may keep other ones; "" for a group by itself. least: minimum number of kept
    units (as many experts as a token is routed to). buffers: slices of buffers with one entry per unit (the correction
    biases of a router), which are no parameters.
    """

    layer: int
    role: Role
    name: str
    units: int
    members: tuple[AxisSlice, ...]
    attributes: tuple[UnitAttribute, ...] = ()
    scaled_norms: tuple[str, ...] = ()
    sliced_arguments: tuple[SlicedArgument, ...] = ()
    bundle: str = field(default="", metadata=_WHERE_USED)
    least: int = field(default=0, metadata=_WHERE_USED)
    buffers: tuple[AxisSlice, ...] = field(default=(), metadata=_WHERE_USED)

    @property
    def consumers(self) -> tuple[AxisSlice, ...]:
        """Members whose axis is contracted with the group's channels (down_proj, o_proj)."""
        return tuple(member for member in self.members if member.side is Side.CONSUMER)

    @property
    def producers(self) -> tuple[AxisSlice, ...]:
        """Members that produce the group's channels (gate, up, q, k, v and their biases)."""
        return tuple(member for member in self.members if member.side is Side.PRODUCER)

    def others(self, units: Iterable[int]) -> list[int]:
        """The units that are not in `units`, ascending: the removed ones, given the kept ones."""
        return sorted(set(range(self.units)) - set(units))

    def parameters_per_unit(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Parameters removed with one unit, when nothing else is pruned. shapes: of the model's tensors."""
        return sum(
            member.width * prod(shape) // shape[member.axis] // (1 if member.part is None else shape[0])
            for member in self.members
            for shape in [shapes[member.tensor]]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigField:
    """A configuration field that sets a role's size in a stock model: value = `per_unit` * kept units."""

    role: Role
    name: str
    per_unit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An unsupported part of the model, and the reason (the op or module that stopped the analysis)."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelGraph(Digested):
    """The coupled groups of a model.

    blocks: module paths of the decoder blocks in order. shapes: of every parameter by name (tied ones once).
    config_fields: for the uniform layout; a stock configuration cannot express a role without one. pinned_fields:
    configuration fields with the value they must keep when others change (head_dim).
    """

    model: ModelRef
    blocks: tuple[str, ...]
    groups: tuple[CoupledGroup, ...]
    shapes: Mapping[str, tuple[int, ...]]
    config_fields: tuple[ConfigField, ...] = ()
    pinned_fields: Mapping[str, int] = field(default_factory=dict)
    refused: tuple[Refusal, ...] = ()

    def group(self, name: str) -> CoupledGroup:
        """The group of that name. Raises KeyError."""
        return {group.name: group for group in self.groups}[name]

    def of_role(self, role: Role) -> tuple[CoupledGroup, ...]:
        """All groups of `role`, in the order of the layers."""
        return tuple(group for group in self.groups if group.role is role)

    def in_block(self, layer: int) -> tuple[CoupledGroup, ...]:
        """All groups inside decoder block `layer`."""
        return tuple(group for group in self.groups if group.layer == layer)

    def block_of(self, tensor: str) -> int:
        """Index of the decoder block that contains the tensor, -1 if none does."""
        return next((layer for layer, path in enumerate(self.blocks) if tensor.startswith(f"{path}.")), -1)

    def renamed(self, dropped: Iterable[int], values: Mapping[str, Value]) -> dict[str, Value]:
        """Values of modules or parameters by their names after blocks are dropped, without those of the blocks."""
        removed = set(dropped)
        found: dict[str, Value] = {}
        for name, value in values.items():
            layer = self.block_of(f"{name}.")
            if layer >= 0 and layer not in removed:
                path = self.blocks[layer]
                number = layer - sum(other < layer for other in removed)
                found[f"{path.rpartition('.')[0]}.{number}{name[len(path) :]}"] = value
            elif layer < 0:
                found[name] = value
        return found

    def in_blocks(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The given tensors that are inside decoder blocks."""
        inside = tuple(f"{path}." for path in self.blocks)
        return {name: shape for name, shape in shapes.items() if name.startswith(inside)}

    @property
    def parameters(self) -> int:
        """Parameters of the whole dense model."""
        return count_parameters(self.shapes)

    @property
    def block_parameters(self) -> int:
        """Parameters of the decoder blocks of the dense model: the base of the pruning ratio."""
        return count_parameters(self.in_blocks(self.shapes))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CalibrationSet(Digested):
    """Token ids of the calibration samples.

    sources: as requested. tokens: (samples, length). ignored: ids of image tokens, which have no loss. inputs: further
    inputs of each sample (pixels), by argument name; () for text.
    """

    sources: tuple[str, ...]
    seed: int
    tokens: IntArray
    ignored: tuple[int, ...] = field(default=(), metadata=_WHERE_USED)
    inputs: tuple[Mapping[str, npt.NDArray[Any]], ...] = field(default=(), metadata=_WHERE_USED)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GroupScores:
    """Statistics over N samples of the importance of each unit of one group; all arrays (units,), float64.

    vector, element: means. vector_m2, element_m2: sums of squared deviations. comoment: sum of the product of both
    deviations. From them mean and variance of any fusion a*vector + b*element follow without a second pass.
    """

    vector: FloatArray
    vector_m2: FloatArray
    element: FloatArray
    element_m2: FloatArray
    comoment: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImportanceScores(Digested):
    """Result of the estimation: statistics per group, with the digests of the graph and the calibration set.

    element_order: "1", "2" or "mixed". losses: mean loss of each sample in nats,
    (0,) if the scores need no backward pass.
    """

    graph_digest: str
    calibration_digest: str
    samples: int
    element_order: str
    aggregation: str
    losses: FloatArray
    groups: Mapping[str, GroupScores]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UnitScores:
    """Score of a group's units in the search: mean and variance over samples, arrays (units,).

    Non-negative and comparable over all groups, except for baselines on a scale with both signs (FLAP).
    """

    mean: FloatArray
    variance: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A candidate evaluated by the search: its name and measured loss (KL to the dense logits, nats/token)."""

    name: str
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StructurePlan(Digested):
    """The structure to keep. keep: group name -> kept unit indices, ascending; a group not listed keeps all.

    dropped_blocks: decoder blocks removed as a whole. parameters, block_parameters: predicted for the whole model and
    for its blocks. trail: the evaluated candidates, this plan's first.
    """

    graph_digest: str
    layout: Layout
    strategy: str
    align: int
    keep: Mapping[str, tuple[int, ...]]
    dropped_blocks: tuple[int, ...] = ()
    parameters: int
    block_parameters: int
    trail: tuple[Candidate, ...] = ()

    def kept(self, group: CoupledGroup) -> tuple[int, ...]:
        """Kept units of `group`."""
        return self.keep.get(group.name, tuple(range(group.units)))

    def removes_nothing(self, graph: ModelGraph) -> bool:
        """Whether the plan keeps every unit of every group."""
        return not self.dropped_blocks and all(len(self.kept(group)) == group.units for group in graph.groups)


def count_parameters(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Number of elements of all tensors."""
    return sum(prod(shape) for shape in shapes.values())
