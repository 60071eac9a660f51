"""Prune a decoder of a class that saap does not know: it finds the coupled structures by tracing the model.

    python examples/custom_decoder.py decoder.pt -o small.pt

Any `torch.nn.Module` with `forward(input_ids)` will do; without a tokenizer it is calibrated on token ids.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import saap

VOCABULARY, WIDTH, INNER, LAYERS, HEADS = 256, 64, 192, 4, 4


class Block(nn.Module):
    """Attention and a gated feed-forward that read the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.output = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, states: Tensor) -> Tensor:
        read = self.norm(states)
        batch, length, _ = read.shape
        q, k, v = (
            layer(read).view(batch, length, -1, WIDTH // HEADS).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended = self.output(attended.transpose(1, 2).flatten(2))
        return states + attended + self.down(nn.functional.silu(self.gate(read)) * self.up(read))


class Decoder(nn.Module):
    """A language model without a configuration, a tokenizer or a base class."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        states = self.embedding(input_ids)
        for block in self.blocks:
            states = block(states)
        return self.head(self.norm(states))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="state_dict of Decoder")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--pruning-ratio", type=float, default=0.25)
    parser.add_argument("--preset", default="default")
    given = parser.parse_args(argv)

    model = Decoder().eval()
    model.load_state_dict(torch.load(given.model))
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (96, 64))  # your own text, as ids
    result = saap.prune(
        model, pruning_ratio=given.pruning_ratio, preset=given.preset, calibration=tokens, sample_length=64, align=8
    )
    torch.save(result.model.state_dict(), given.output)  # result.model itself is ready to use
    kept, whole = (sum(parameter.numel() for parameter in one.parameters()) for one in (result.model, model))
    print(f"{kept} of {whole} parameters")


if __name__ == "__main__":
    main()
