"""Norms that an architecture has and a family lacks, made the identity by scales around them.

RMSNorm(s y) = s y / sqrt(s^2 mean(y^2) + epsilon). With s = r sqrt(epsilon) this is r y up to the relative error
r^2 mean(y^2) / 2, and the norm's weight 1 / r gives y. A scale is a tensor of one value that llama.cpp multiplies
outputs of a matrix by, so the matrices themselves stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from saap.export.gguf.architectures import PerLayer

_RATIO = 2.0**-30  # leaves an error below that of float32
# The cache keeps values in float16 right after their norm. For outputs of 2^-4 to 2^5, what it stores is a normal
# number, and the error is below its rounding, 2^-11.
_RATIO_OF_VALUES = 2.0**-10


def neutral_norms(
    architecture: PerLayer, blocks: int, present: Collection[str], epsilon: float, sizes: tuple[int, int]
) -> dict[str, tuple[float, ...]]:
    """Values of the scales, and of the norms that are not among the tensors `present`, by their names in the file.

    sizes: of the hidden state and of a head. The values of a norm do not include its offset.
    """
    hidden, head = sizes
    found = {}
    for layer in range(blocks):
        scales: dict[str, float] = {}
        for module, norm in architecture.norms.items():
            name = f"blk.{layer}.{norm}.weight"
            if name not in present:
                found[name] = (1 / _RATIO,) * (head if module in ("attn_q", "attn_k") else hidden)
                scales[module] = _RATIO * math.sqrt(epsilon)
        if architecture.value_norm:
            scales["attn_v"] = _RATIO_OF_VALUES * math.sqrt(epsilon)
            scales["attn_output"] = scales.get("attn_output", 1.0) / _RATIO_OF_VALUES
        found |= {f"blk.{layer}.{module}.scale": (scale,) for module, scale in scales.items()}
    return found
