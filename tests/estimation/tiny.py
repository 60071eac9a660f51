"""A model that is none of transformers'."""

from __future__ import annotations

import torch
from tests.families import VOCABULARY
from torch import Tensor, nn


class OwnBlock(nn.Module):
    """A residual block with its own calling convention."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)
        self.returns_tuple = returns_tuple

    def forward(self, states: Tensor, *, scale: Tensor) -> Tensor | tuple[Tensor, None]:
        out = states + scale * self.down(torch.tanh(self.up(states)))
        return (out, None) if self.returns_tuple else out


class OwnModel(nn.Module):
    """A user's own decoder: forward(input_ids) gives the logits themselves."""

    def __init__(self, returns_tuple: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 12)
        self.blocks = nn.ModuleList(OwnBlock(returns_tuple) for _ in range(3))
        self.head = nn.Linear(12, VOCABULARY)
        self.double()

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        scale = torch.tensor(0.5, dtype=hidden.dtype)
        for block in self.blocks:
            out = block(states=hidden, scale=scale)
            hidden = out[0] if isinstance(out, tuple) else out
        return self.head(hidden)
