from __future__ import annotations

import pytest
import torch
from tests.estimation.tiny import block_paths, build, token_ids
from torch import nn

from saap.models.walk.loss import sample_losses
from saap.models.walk.walker import BlockWalker


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
@pytest.mark.parametrize("tokens_at_once", [4, 100])
def test_loss_and_gradient_equal_autograd_over_the_whole(family: str, tokens_at_once: int) -> None:
    model, tokens = build(family), token_ids(3, 11)
    walker = BlockWalker(model, block_paths(model))
    hidden = walker.start(tokens).hidden.requires_grad_(True)
    logits = walker.logits(hidden)
    expected = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
    (slope,) = torch.autograd.grad(expected.sum(), hidden)
    losses, gradient = sample_losses(walker, hidden.detach(), tokens, tokens_at_once=tokens_at_once)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-15)
