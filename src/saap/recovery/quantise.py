"""Group-wise quantisation: codes, scales and zero points by search."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from saap.core.errors import GroupSizeError, ModelError, listed
from saap.models.checkpoint.groupwise import VALUES_AT_ONCE, GroupwiseWeight, pack
from saap.settings.recover import LEGAL_GROUP_SIZES

GRID_FITS = 2
"""Least-squares fits of scale and zero point after each initial choice of codes."""


def check_group_sizes(inputs: Mapping[str, int], group_size: int) -> None:
    """Raise GroupSizeError with the matrices whose input size `group_size` does not divide, and legal group sizes.

    inputs: input size of each matrix by name.
    """
    bad = [f"{name} ({size})" for name, size in inputs.items() if size % group_size]
    if not bad:
        return
    legal = [str(size) for size in LEGAL_GROUP_SIZES if not any(width % size for width in inputs.values())]
    prune_so = f"Prune with --align {group_size}"
    remedy = f"{prune_so}, or use --group-size {' or '.join(legal)}" if legal else prune_so
    count = "1 matrix has" if len(bad) == 1 else f"{len(bad)} matrices have"
    raise GroupSizeError(f"{count} an input size that {group_size} does not divide: {listed(bad, 6)}", remedy)


def quantise(weight: Tensor, *, group_size: int, bits: int) -> GroupwiseWeight:
    """Codes, scales and zero points of least squared error, found by a short search.

    weight: (out, in), in a multiple of group_size. Several step sizes (numbers of steps in the range) are tried for
    each group. For each, scale and zero point are fitted to the codes by least squares, the scale is rounded to
    float16, and the best one is kept by group. A group on a grid of `bits` bits with a float16 scale is reproduced
    exactly.
    Raises GroupSizeError, and ModelError for values that are not finite or too large.
    """
    inputs = weight.shape[1]
    check_group_sizes({"the matrix": inputs}, group_size)
    parts = torch.split(weight, max(1, VALUES_AT_ONCE // max(1, inputs)))
    grids = (_best_grid(part.float().reshape(len(part), -1, group_size), bits) for part in parts)
    found = [(pack(codes, bits), scale, zero) for codes, scale, zero in grids]
    packed, scales, zeros = map(torch.cat, zip(*found, strict=True))
    return _finite_weight(packed, scales, zeros, bits, group_size)


def _finite_weight(packed: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int) -> GroupwiseWeight:
    scale = scale.half()
    if not (bool(scale.isfinite().all()) and bool(zero.isfinite().all())):
        raise ModelError("A weight is not finite, or too large for a float16 scale", "Use another checkpoint")
    return GroupwiseWeight(packed=packed, scale=scale, zero=zero, bits=bits, group_size=group_size)


def _best_grid(part: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """part: (rows, groups, L) float32. Returns codes uint8 of that shape, scale and zero (rows, groups) float32."""
    top = 2**bits - 1
    # numbers of steps in the range of a group: first the plain number
    spans = [top, *([top - 1] if top > 3 else []), top * 1.08, top * 1.18, *([top * 1.35] if top <= 7 else [])]
    low, high = part.amin(-1), part.amax(-1)
    best_error = torch.full_like(low, torch.inf)
    best_codes = torch.zeros_like(part)
    fits = ((high - low) / top).half().isfinite()
    best_scale, best_zero = torch.where(fits, 0.0, torch.inf), part.mean(-1)
    for span in spans:
        scale = ((high - low) / span).half().float()
        zero = low + (high - low - scale * top).clamp_min(0) / 2
        for _ in range(GRID_FITS + 1):
            codes = _codes(part, scale, zero, top)
            error = (part - codes * scale.unsqueeze(-1) - zero.unsqueeze(-1)).square_().sum(-1)
            better = (error < best_error) & fits
            best_error = torch.where(better, error, best_error)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
            best_codes = torch.where(better.unsqueeze(-1), codes, best_codes)
            scale, zero = _fit_grid(part, codes)
    return best_codes.to(torch.uint8), best_scale, best_zero


def _codes(part: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    return ((part - zero.unsqueeze(-1)) / safe.unsqueeze(-1)).round_().clamp_(0, top)


def _fit_grid(part: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Scale (rounded to float16) and zero point of least squared error for given codes."""
    code_mean, mean = codes.mean(-1, keepdim=True), part.mean(-1, keepdim=True)
    centred = codes - code_mean
    spread = centred.square().sum(-1).clamp_min(1e-12)
    scale = (((part - mean) * centred).sum(-1) / spread).half().float()
    return scale, (mean - scale.unsqueeze(-1) * code_mean).squeeze(-1)
