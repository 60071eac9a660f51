"""The loss that recovery lowers, a few tokens' logits at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from saap.models.loading.precision import widest_dtype
from saap.models.walk.loss import token_losses
from saap.models.walk.walker import BlockWalker

LOGITS_AT_ONCE = 2**22
"""So many logits exist at once: 16 MB in float32, whatever the vocabulary."""


def loss_and_gradient(
    walker: BlockWalker,
    hidden: Tensor,
    tokens: Tensor,
    learned: Tensor,
    *,
    predictions: int,
    teacher: tuple[BlockWalker, Tensor] | None = None,
    weight: float = 0.0,
    with_gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Loss of each sample, and the gradient of their sum over `predictions` at the last block's output.

    hidden: (samples, length, width) output of the last block. tokens: (samples, length). learned: (samples, length)
    bool, which tokens are to be predicted from the position before. teacher: walker and last hidden states of the dense
    model for the same tokens; the loss of a token is then (1 - weight) (-log p) + weight KL(teacher || model), without
    it -log p. Returns sums over the learned tokens in nats, (samples,) of `widest_dtype`, not divided.
    """
    samples, places = learned[:, 1:].nonzero(as_tuple=True)
    rows, targets = hidden[samples, places].detach(), tokens[:, 1:][learned[:, 1:]]
    teacher_rows = None if teacher is None else teacher[1][samples, places]
    losses = torch.zeros(len(hidden), dtype=widest_dtype(hidden.device), device=hidden.device)
    gradient = torch.zeros_like(hidden) if with_gradient else None
    start, at_once = 0, 16
    while start < len(rows):
        stop = min(start + at_once, len(rows))
        part = rows[start:stop].unsqueeze(0).requires_grad_(with_gradient)
        with torch.set_grad_enabled(with_gradient):
            logits = walker.logits(part)
        soft_targets = None
        if teacher is not None and teacher_rows is not None:
            with torch.no_grad():
                soft_targets = teacher[0].logits(teacher_rows[start:stop].unsqueeze(0))[0]
            soft_targets = soft_targets.float().softmax(-1).to(logits.device)
        values, slope = token_losses(logits.detach()[0], targets[start:stop].to(logits.device), soft_targets, weight)
        losses.index_add_(0, samples[start:stop], values.to(losses))
        if gradient is not None:
            (found,) = torch.autograd.grad(logits, part, slope.div_(predictions).to(logits.dtype).unsqueeze(0))
            gradient[samples[start:stop], places[start:stop]] = found[0]
        start, at_once = stop, max(1, LOGITS_AT_ONCE // logits.shape[-1])
    return losses, gradient
