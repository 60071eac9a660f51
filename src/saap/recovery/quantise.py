"""Group-wise quantisation: codes, scales and zero points by search, or with error feedback (GPTQ)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from saap.core.errors import GroupSizeError, ModelError, listed
from saap.models.checkpoint.groupwise import VALUES_AT_ONCE, GroupwiseWeight, linears_inside, pack, pack_linear
from saap.models.loading.precision import in_float64
from saap.models.structure.linear import weight_out_in
from saap.models.walk.observer import capture
from saap.models.walk.spill import PackedTensors
from saap.models.walk.walk import embed, run_block
from saap.models.walk.walker import BlockWalker
from saap.settings.recover import LEGAL_GROUP_SIZES

GRID_FITS = 2
"""Least-squares fits of scale and zero point after each initial choice of codes."""
DAMPING = 0.01
"""Added to the Gram matrix of the error feedback, as a share of its mean diagonal (GPTQ's value)."""


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


def quantise_with_feedback(weight: Tensor, gram: Tensor, *, group_size: int, bits: int) -> GroupwiseWeight:
    """Quantise column by column; later columns compensate for the error of earlier ones (GPTQ).

    weight: (out, in). gram: (in, in) sum of x x^T over calibration tokens. Minimises |(W - Q) X|^2 greedily; scale and
    zero point of a group are chosen when its first column is reached.
    Raises GroupSizeError, and ModelError for inputs or weights that are not finite.
    Source: GPTQ (Frantar et al. 2022), with the Cholesky factor of the inverse Gram matrix.
    """
    check_group_sizes({"the matrix": weight.shape[1]}, group_size)
    top = 2**bits - 1
    work = weight.float().clone()
    factor = _inverse_factor(gram)
    codes = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    scales, zeros = [], []
    for start in range(0, work.shape[1], group_size):
        stop = start + group_size
        _, scale, zero = _best_grid(work[:, start:stop].unsqueeze(1), bits)
        scales.append(scale)
        zeros.append(zero)
        errors = torch.empty(len(work), group_size, device=work.device)
        for column in range(start, stop):
            code = _codes(work[:, column : column + 1].unsqueeze(1), scale, zero, top).squeeze(1)
            codes[:, column] = code.squeeze(1).to(torch.uint8)
            error = (work[:, column : column + 1] - code * scale - zero) / factor[column, column]
            work[:, column:stop] -= error * factor[column, column:stop]
            errors[:, column - start] = error.squeeze(1)
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    grouped = codes.reshape(len(codes), -1, group_size)
    return _finite_weight(pack(grouped, bits), torch.cat(scales, dim=1), torch.cat(zeros, dim=1), bits, group_size)


def _inverse_factor(gram: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped Gram matrix, both float32."""
    if not bool(gram.isfinite().all()):
        raise ModelError("The input of a linear layer is not finite", "Use another checkpoint")
    damped = in_float64(gram)
    diagonal = damped.diagonal()
    diagonal += DAMPING * diagonal.mean().clamp_min(1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float().to(gram.device)


@torch.no_grad()
def quantise_by_feedback(
    model: nn.Module,
    blocks: Sequence[str],
    samples: Sequence[Tensor],
    *,
    group_size: int,
    bits: int,
    progress: Callable[[int, int], None],
) -> None:
    """Quantise a loaded model with error feedback, in place and block by block.

    samples: token ids, (1, length) each. The input of a block is the output of the quantised blocks before it.
    """
    walker = BlockWalker(model, blocks)
    hidden, contexts = embed(walker, samples, PackedTensors)
    for layer, block in enumerate(blocks):
        sizes = linears_inside(model, [block])
        grams = {path: torch.zeros(size, size, device=hidden[0].device) for path, size in sizes.items()}
        for one, context in zip(hidden, contexts, strict=True):
            with capture(model, list(sizes)) as seen:
                walker.run_block(layer, one, context)
            for path, call in seen.items():
                flat = call.input.reshape(-1, call.input.shape[-1]).float()
                grams[path].addmm_(flat.T, flat)
        for path, gram in grams.items():  # zero for a layer that no token reaches
            stored = weight_out_in(model.get_submodule(path))
            weight = quantise_with_feedback(stored, gram, group_size=group_size, bits=bits)
            pack_linear(model, path, weight, gram.device)
        hidden = run_block(walker, layer, hidden, contexts, PackedTensors)
        progress(layer + 1, len(blocks))
