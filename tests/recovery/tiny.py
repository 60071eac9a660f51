"""Tiny models whose input sizes 16 divides."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tests.families import EVERY, randomised
from torch import nn


def build(family: str, seed: int = 0) -> Any:
    """The tiny model of a family with input sizes that 16 divides; tokens take all experts, whatever is rounded."""
    kind, sizes = EVERY[family]
    fitting = {"head_dim": 16, "query_pre_attn_scalar": 16, "word_embed_proj_dim": 32, "moe_topk": 4}
    fitting |= {
        "global_head_dim": 16,
        "q_lora_rank": 16,
        "kv_lora_rank": 32,
        "v_head_dim": 16,
        "num_experts_per_tok": 4,
    }
    sizes = {name: fitting.get(name, 48 if value == 40 else value) for name, value in sizes.items()}
    torch.manual_seed(seed)
    return randomised(transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**sizes)), seed)


def blocks(model: Any) -> tuple[str, ...]:
    stack = next(path for path, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return tuple(f"{stack}.{index}" for index in range(len(model.get_submodule(stack))))
