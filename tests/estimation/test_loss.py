from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.families import build, token_ids
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from saap.discovery.blocks import find_blocks
from saap.models.walk import loss
from saap.models.walk.walker import BlockWalker


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
@pytest.mark.parametrize("tokens_at_once", [4, 100])
def test_loss_and_gradient_equal_autograd_over_the_whole(
    monkeypatch: pytest.MonkeyPatch, family: str, tokens_at_once: int
) -> None:
    model, tokens = build(family), token_ids(3, 11)
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", tokens_at_once * model.config.vocab_size)
    walker = BlockWalker(model, find_blocks(model))
    hidden = walker.start(tokens).hidden.requires_grad_(True)
    logits = walker.logits(hidden)
    expected = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
    (slope,) = torch.autograd.grad(expected.sum(), hidden)
    losses, gradient = loss.sample_losses(walker, hidden.detach(), tokens)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-15)


class Casts(TorchDispatchMode):
    """Counts tensors of a shape that get another type."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function is torch.ops.aten._to_copy.default:
            self.count += arguments[0].shape == self.shape
        return function(*arguments, **(keywords or {}))


def test_the_head_is_rounded_once_and_stays_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = build("llama").float().requires_grad_(False), token_ids(2, 11)
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 4 * model.config.vocab_size)
    exact = BlockWalker(model, find_blocks(model))
    rounded = BlockWalker(model, find_blocks(model), products=torch.bfloat16)
    hidden = exact.start(tokens).hidden
    expected, found = (loss.sample_losses(walker, hidden, tokens) for walker in (exact, rounded))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-2, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=0.1, atol=float(expected[1].abs().max()) / 50)
    assert not any(one.requires_grad for one in model.parameters())
    casts = Casts(model.get_output_embeddings().weight.shape)
    with casts, rounded.rounded_head(hidden.device):
        for _ in range(3):
            rounded.logits(hidden)
    assert casts.count == 1
