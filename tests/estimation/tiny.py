"""Tiny random models of every family, and a model that is none of transformers'."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

_SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "vocab_size": 96,
}
_HEADS = {**_SIZES, "head_dim": 16}
_GPT2 = {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_inner": 80, "n_positions": 64, "vocab_size": 96}
_OPT = {"ffn_dim": 80, "word_embed_proj_dim": 40, "do_layer_norm_before": True}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _HEADS),
    "mistral": ("MistralConfig", {**_HEADS, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", _SIZES),
    "qwen3": ("Qwen3Config", _HEADS),
    "gemma2": ("Gemma2Config", {**_HEADS, "query_pre_attn_scalar": 16, "sliding_window": 8}),
    "phi3": ("Phi3Config", {**_SIZES, "pad_token_id": 0}),
    "gpt2": ("GPT2Config", _GPT2),
    "opt": ("OPTConfig", {**_SIZES, **_OPT}),
    "bloom": ("BloomConfig", {"hidden_size": 48, "n_layer": 2, "n_head": 4, "vocab_size": 96}),
    "gpt_neox": ("GPTNeoXConfig", _SIZES),
}


def build(family: str) -> nn.Module:
    """The family's tiny model in float64 with every weight random."""
    name, sizes = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.requires_grad_(False)


def token_ids(samples: int, length: int) -> Tensor:
    return torch.randint(2, 96, (samples, length), generator=torch.Generator().manual_seed(1))


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
        self.embed = nn.Embedding(96, 12)
        self.blocks = nn.ModuleList(OwnBlock(returns_tuple) for _ in range(3))
        self.head = nn.Linear(12, 96)
        self.double()

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        scale = torch.tensor(0.5, dtype=hidden.dtype)
        for block in self.blocks:
            out = block(states=hidden, scale=scale)
            hidden = out[0] if isinstance(out, tuple) else out
        return self.head(hidden)


def block_paths(model: nn.Module) -> list[str]:
    """Paths of the members of the model's longest ModuleList."""
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    path, found = max(lists, key=lambda item: len(item[1]))
    return [f"{path}.{index}" for index in range(len(found))]
