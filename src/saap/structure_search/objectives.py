"""What "enough" means: every target becomes the number of parameters to remove."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from saap.core.errors import TargetError
from saap.core.records import ModelGraph, count_parameters
from saap.models.structure.keep_index import KeepIndex, Kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """At least `removal` parameters must be removed: of the decoder blocks, or (`whole_model`) of the whole model."""

    removal: int
    whole_model: bool = False

    def removed(self, graph: ModelGraph, keep: Mapping[str, Kept], dropped_blocks: Iterable[int] = ()) -> int:
        """Parameters that count and leave with this structure."""
        shapes = KeepIndex.of(graph, keep, dropped_blocks).shapes
        if self.whole_model:
            return graph.parameters - count_parameters(shapes)
        return graph.block_parameters - count_parameters(graph.in_blocks(shapes))

    def unreachable(self, graph: ModelGraph, removed: int, how: str) -> TargetError:
        """The refusal of a budget of which at most `removed` can be reached."""
        base = graph.parameters if self.whole_model else graph.block_parameters
        return TargetError(
            f"{self.removal:,} parameters cannot be removed {how}, at most {removed:,} can",
            f"Ask for a reduction of at most {int(removed / base * 1000) / 1000:g}, or allow more roles or layers",
        )


def budget_for_ratio(graph: ModelGraph, ratio: float) -> Budget:
    """Budget of a fraction `ratio` of the decoder blocks' parameters. Raises TargetError."""
    if not 0 <= ratio < 1:
        raise TargetError(
            f"pruning ratio {ratio:g} is out of range", "Give a fraction of at least 0 and below 1, e.g. 0.2"
        )
    return Budget(removal=math.ceil(ratio * graph.block_parameters - 1e-6))


def budget_for_parameters(graph: ModelGraph, target: int) -> Budget:
    """Budget so that at most `target` remain in the whole model. Raises TargetError."""
    if target > graph.parameters or target < 1:
        raise TargetError(
            f"target of {target:,} parameters is out of range for a model of {graph.parameters:,}",
            f"Give a number from 1 to {graph.parameters:,}",
        )
    return Budget(removal=graph.parameters - target, whole_model=True)


def header_bytes(shapes: Mapping[str, tuple[int, ...]], dtype_name: str = "BF16") -> int:
    """Bytes that a safetensors file takes beside its tensors: an upper bound from the names and shapes."""
    largest = 2**40
    header = {
        name: {"dtype": dtype_name, "shape": list(shape), "data_offsets": [largest, largest]}
        for name, shape in shapes.items()
    }
    return 8 + len(json.dumps(header)) + 64


def budget_for_bytes(graph: ModelGraph, target: int, bytes_per_parameter: int) -> Budget:
    """Budget so that the weights as written take at most `target` bytes. Raises TargetError."""
    full = graph.parameters * bytes_per_parameter + header_bytes(graph.shapes)
    allowed = (target - header_bytes(graph.shapes)) // bytes_per_parameter
    if allowed < 1 or target > full:
        raise TargetError(
            f"target of {target:,} bytes is out of range for weights of {full:,} bytes",
            f"Give a size below {full:,} bytes",
        )
    return Budget(removal=max(0, graph.parameters - allowed), whole_model=True)
