"""The causal language model loss at the end of a block walk, a few tokens' logits at a time."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from saap.core.errors import CalibrationError, NonFiniteLossError
from saap.models.loading.precision import widest_dtype
from saap.models.walk.walker import BlockWalker

LOGITS_AT_ONCE = 2**23
"""Logits that exist at once: 32 MB in float32, for any vocabulary."""
LEAST_REST = 1e-6
"""Probability of all other tokens, at least: it is a difference, exact to the rounding of 1."""


@dataclass(frozen=True, slots=True)
class TopPredictions:
    """The k most probable next tokens of a teacher at each position, and the logarithms of their probabilities.

    tokens: (..., k) ids. log_q: (..., k) in nats.
    """

    tokens: Tensor
    log_q: Tensor

    def at(self, *index: Tensor) -> TopPredictions:
        """Those of some positions."""
        return TopPredictions(self.tokens[index], self.log_q[index])

    def completed(self, log_p: Tensor) -> Tensor:
        """Logarithms of the probabilities q of all tokens, (positions, vocabulary). log_p: those of the model.

        What is left of q is split as the model does. So KL(q || p) and its gradient are those of k + 1 classes: the
        rest is one of them.
        """
        index = self.tokens.to(log_p.device, torch.int64)
        log_q = self.log_q.to(log_p)
        rest_q = (1 - log_q.exp().sum(-1, keepdim=True)).clamp_min(LEAST_REST).log()
        rest_p = log_p.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
        return (log_p + (rest_q - rest_p)).scatter_(-1, index, log_q)


def sample_losses(
    walker: BlockWalker,
    hidden: Tensor,
    labels: Tensor,
    *,
    first_sample: int = 0,
    ignored: Collection[int] = (),
) -> tuple[Tensor, Tensor]:
    """Mean loss of each calibration sample, and the gradient of its own loss at the last block's output.

    hidden: (samples, tokens, width) output of the last block. labels: (samples, tokens), the input tokens; each is
    predicted from the position before it. first_sample: number of the first sample, for the message. ignored: labels
    without a loss (image tokens).
    Returns the mean negative log-likelihood over the tokens - 1 predictions, (samples,) in nats, in at least float32,
    and the gradient, (samples, tokens, width). The head's weights get gradients only if they require them.
    Raises NonFiniteLossError, CalibrationError for samples of one token.
    """
    length = labels.shape[1]
    if length < 2:
        raise CalibrationError("A calibration sample of one token predicts nothing", "Use --sample-length 2 or more")
    learned = torch.isin(labels, torch.tensor(list(ignored), dtype=labels.dtype, device=labels.device), invert=True)
    with torch.enable_grad():
        losses, gradient = learned_losses(walker, hidden, labels, learned, predictions=length - 1)
    losses /= length - 1
    for sample, loss in enumerate(losses.tolist()):
        if not loss - loss == 0:
            raise NonFiniteLossError(
                f"The loss of calibration sample {first_sample + sample} is {loss}",
                "Compute in float32 (--dtype float32) and check the text of that sample",
            )
    return losses, gradient


def learned_losses(
    walker: BlockWalker,
    hidden: Tensor,
    tokens: Tensor,
    learned: Tensor,
    *,
    predictions: int,
    teacher: tuple[BlockWalker, Tensor] | TopPredictions | None = None,
    weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Summed loss of each training sample, and the gradient of their sum over `predictions` at the last block's output.

    hidden: (samples, length, width) output of the last block. tokens: (samples, length). learned: (samples, length)
    bool, which tokens have a loss. teacher: walker and last hidden states of the dense model for the same tokens, or
    what it predicts after each, (samples, length, k); the loss of a token is then (1 - weight) (-log p) + weight
    KL(teacher || model), without a teacher -log p. Returns sums over the learned tokens in nats, (samples,) of
    `widest_dtype`, not divided; the gradient is zero where gradients are off.
    """
    samples, places = learned[:, 1:].nonzero(as_tuple=True)
    rows, targets = hidden[samples, places], tokens[:, 1:][learned[:, 1:]]
    losses = torch.zeros(len(hidden), dtype=widest_dtype(hidden.device), device=hidden.device)
    gradient = torch.zeros_like(hidden)
    start, at_once = 0, 16
    with ExitStack() as heads:
        for one in {walker, teacher[0]} if isinstance(teacher, tuple) else {walker}:
            heads.enter_context(one.rounded_head(hidden.device))
        while start < len(rows):
            part = slice(start, min(start + at_once, len(rows)))
            log_q: Tensor | TopPredictions | None = None
            if isinstance(teacher, TopPredictions):
                log_q = teacher.at(samples[part], places[part])
            elif teacher is not None:
                log_q = log_probabilities(teacher[0], teacher[1][samples[part], places[part]])
            values, found, vocabulary = _losses_and_gradient(
                walker, rows[part], targets[part], predictions, log_q=log_q, weight=weight,
                with_gradient=torch.is_grad_enabled(),
            )  # fmt: skip
            losses.index_add_(0, samples[part], values.to(losses))
            gradient[samples[part], places[part]] = found
            start, at_once = part.stop, max(1, LOGITS_AT_ONCE // vocabulary)
    return losses, gradient


@torch.no_grad()
def log_probabilities(walker: BlockWalker, hidden: Tensor) -> Tensor:
    """Of the next token, (positions, vocabulary) float32. hidden: (positions, width) output of the last block."""
    # sequences of one token: a single one of them all could be longer than the model reads
    return walker.logits(hidden.unsqueeze(1))[:, 0].log_softmax(-1, dtype=torch.float32)


def _losses_and_gradient(
    walker: BlockWalker,
    hidden: Tensor,
    targets: Tensor,
    predictions: int,
    *,
    log_q: Tensor | TopPredictions | None = None,
    weight: float = 0.0,
    with_gradient: bool = True,
) -> tuple[Tensor, Tensor, int]:
    """Loss of each token, the gradient of their sum over `predictions`, and the size of the vocabulary.

    hidden: (tokens, width). targets: (tokens,). log_q: (tokens, vocabulary) logarithms of the teacher's probabilities
    q, whose storage is used up, or the largest of each token. With p of the model the loss is (1 - weight)
    (-log p[target]) + weight sum_v q (log q - log p). Its gradient for the logits is p - (1 - weight) onehot - weight
    q, float32 at least; it reuses the storage of the log-softmax.
    """
    # sequences of one token: a single one of them all could be longer than the model reads
    part = hidden.detach().unsqueeze(1).requires_grad_(with_gradient)
    with torch.set_grad_enabled(with_gradient):
        logits = walker.logits(part)
    log_p = logits.detach()[:, 0].log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    index = targets.to(logits.device).unsqueeze(-1)
    losses = -log_p.gather(-1, index).squeeze(-1)
    if log_q is None:
        slope, share = log_p.exp_(), 1.0
    else:
        log_q = log_q.completed(log_p) if isinstance(log_q, TopPredictions) else log_q.to(logits.device)
        share = 1 - weight
        q = log_q.exp()
        losses = share * losses + weight * (q * log_q.sub_(log_p)).sum(-1)
        slope = log_p.exp_().sub_(q, alpha=weight)
    slope.scatter_add_(-1, index, torch.full_like(index, -share, dtype=slope.dtype))
    gradient = torch.zeros_like(hidden)
    if with_gradient:
        (found,) = torch.autograd.grad(logits, part, slope.div_(predictions).to(logits.dtype).unsqueeze(1))
        gradient = found[:, 0]
    return losses, gradient, logits.shape[-1]
