"""How the scale of a norm depends on its weight: w, or 1 + w as in some families. Measured on the module itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saap.models.loading.precision import in_float64


@torch.no_grad()
def constant_share(norm: nn.Module) -> float | None:
    """A where the scale of a norm with a weight is proportional to A + (1 - A) w; None where it is not of this form.

    Found by running the norm with w = 0 and w = 1.
    """
    weight = norm._parameters["weight"]
    assert weight is not None
    before = weight.data
    inputs = torch.linspace(1, 2, len(before), dtype=before.dtype, device=before.device).unsqueeze(0)
    outputs: list[Tensor] = []
    for value in (0.0, 1.0):
        weight.data = torch.full_like(before, value)
        outputs.append(in_float64(norm(inputs)))
    weight.data = before
    ratio = outputs[0] / outputs[1]
    constant = round(float(ratio.mean()), 2)
    if not torch.allclose(ratio, torch.full_like(ratio, constant), atol=1e-2) or constant >= 1:
        return None
    return constant


def scaled_weight(weight: Tensor, constant: float, factor: float) -> Tensor:
    """The weight that multiplies a norm's scale, constant + (1 - constant) w, by `factor`; of the same type."""
    new = in_float64(weight) * factor
    if constant:
        new += constant * (factor - 1) / (1 - constant)
    return new.to(weight)
