"""The causal language model loss at the end of a block walk, a few tokens' logits at a time."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from saap.core.errors import CalibrationError, NonFiniteLossError
from saap.models.walk.walker import BlockWalker

TOKENS_AT_ONCE = 64
"""So many tokens' logits exist at once: 12 MB each for float32 and a vocabulary of 49152."""


def loss_and_gradient(
    walker: BlockWalker,
    hidden: Tensor,
    labels: Tensor,
    *,
    first_sample: int = 0,
    tokens_at_once: int = TOKENS_AT_ONCE,
    ignored: Collection[int] = (),
) -> tuple[Tensor, Tensor]:
    """Loss of each sample, and the gradient of its own loss at the last block's output.

    hidden: (samples, tokens, width) output of the last block. labels: (samples, tokens), the tokens that were read;
    each is predicted from the position before it. first_sample: number of the first sample, for the message.
    ignored: labels that add nothing to the loss (places of images).
    Returns the mean negative log-likelihood over the tokens - 1 predictions, (samples,) in nats, in at least float32,
    and the gradient, (samples, tokens, width). The head's weights get no gradient if they ask for none.
    Raises NonFiniteLossError, CalibrationError for samples of one token.
    """
    samples, length = labels.shape
    if length < 2:
        raise CalibrationError("A calibration sample of one token predicts nothing", "Use --sample-length 2 or more")
    gradient = torch.zeros_like(hidden)
    losses = torch.zeros(samples, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    for sample in range(samples):
        for start in range(0, length - 1, tokens_at_once):
            stop = min(start + tokens_at_once, length - 1)
            likelihood, gradient[sample, start:stop] = _likelihood_and_gradient(
                walker, hidden[sample, start:stop], labels[sample, start + 1 : stop + 1], length - 1, ignored
            )
            losses[sample] -= likelihood.to(losses.device)
    losses /= length - 1
    for sample, loss in enumerate(losses.tolist()):
        if not loss - loss == 0:
            raise NonFiniteLossError(
                f"The loss of calibration sample {first_sample + sample} is {loss}",
                "Compute in float32 (--dtype float32) and check the text of that sample",
            )
    return losses, gradient


def _likelihood_and_gradient(
    walker: BlockWalker, hidden: Tensor, targets: Tensor, predictions: int, ignored: Collection[int]
) -> tuple[Tensor, Tensor]:
    """Sum of the targets' log-likelihoods, and the gradient of their share of a mean loss over `predictions`.

    hidden: (tokens, width). targets: (tokens,). The logits and one more tensor of their size exist, not more: the
    slope d loss / d logits = (softmax - one-hot) / predictions takes the storage of the log-softmax.
    """
    part = hidden.detach().unsqueeze(0).requires_grad_(True)
    with torch.enable_grad():
        logits = walker.logits(part)
    losses, slope = token_losses(logits.detach()[0], targets.to(logits.device))
    if ignored:
        without = torch.isin(targets.to(logits.device), torch.tensor(list(ignored), device=logits.device))
        losses, slope = losses.masked_fill(without, 0.0), slope.masked_fill_(without.unsqueeze(-1), 0.0)
    likelihood = -losses.sum()
    (gradient,) = torch.autograd.grad(logits, part, slope.div_(predictions).to(logits.dtype).unsqueeze(0))
    return likelihood, gradient[0]


def token_losses(
    logits: Tensor, targets: Tensor, goal: Tensor | None = None, weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Loss of each token and its slope.

    logits: (tokens, vocabulary). targets: (tokens,). goal: (tokens, vocabulary) probabilities of the teacher. Returns
    (tokens,) (1 - weight) (-log p[target]) + weight sum_v goal (log goal - log p), and its gradient by the logits,
    p - (1 - weight) onehot - weight goal, float32 at least.
    """
    log_p = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    index = targets.unsqueeze(-1)
    losses = -log_p.gather(-1, index).squeeze(-1)
    if goal is None:
        slope = log_p.exp_()
        return losses, slope.scatter_add_(-1, index, torch.full_like(index, -1, dtype=slope.dtype))
    divergence = torch.xlogy(goal, goal).sum(-1) - (goal * log_p).sum(-1)
    slope = log_p.exp_().sub_(goal, alpha=weight)
    slope.scatter_add_(-1, index, torch.full_like(index, weight - 1, dtype=slope.dtype))
    return (1 - weight) * losses + weight * divergence, slope
