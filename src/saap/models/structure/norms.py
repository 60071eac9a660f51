"""Rescaling of norms with removed channels, so that the output of the kept channels does not change."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saap.core.errors import UnsupportedModelError
from saap.models.checkpoint.pruned_structure import epsilon_name
from saap.models.loading.precision import in_float64


@torch.no_grad()
def scaled_weight(norm: nn.Module, factor: float) -> Tensor | None:
    """The weight that multiplies a norm's scale by `factor`; None unless the scale is A + (1 - A) w for a number A.

    A, not 0 in families whose scale is 1 + w, is found by running the norm with w = 0 and w = 1.
    """
    weight = norm.get_parameter("weight")
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
    new = in_float64(before) * factor
    if constant:
        new += constant * (factor - 1) / (1 - constant)
    return new.to(before)


def rescale_norm(norm: nn.Module, share: float, name: str) -> None:
    """Make an RMS norm over the kept channels equal to the one over all channels with the others zero.

    With sum of squares S over n channels: x / sqrt(S/n + e) = share^-0.5 x / sqrt(S/kept + e/share), share = kept/n.
    So the effective scale is multiplied by share^-0.5 and epsilon by 1/share. Raises UnsupportedModelError if the norm
    has no weight or epsilon, or its scale is not an affine function of the weight.
    """
    epsilon, weight = epsilon_name(norm), norm._parameters.get("weight")
    scaled = None if weight is None else scaled_weight(norm, share**-0.5)
    if weight is None or epsilon is None or scaled is None:
        raise UnsupportedModelError(
            f"The norm {name} has no weight and epsilon that could compensate for removed channels",
            "Prune without the role that it spans (hidden)",
        )
    weight.data = scaled
    value = getattr(norm, epsilon)
    setattr(norm, epsilon, (torch.finfo(weight.dtype).eps if value is None else value) / share)
