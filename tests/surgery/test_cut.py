"""Blocks that compute otherwise in another place are no blocks to remove."""

from __future__ import annotations

import pytest
import torch
import transformers
from tests import families

from saap.core.errors import UnsupportedModelError
from saap.discovery.blocks import find_blocks
from saap.surgery.cut import check_block_removal

SIZES = {"vocab_size": 64, "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
BY_PLACE = {
    "lambda_init": transformers.DiffLlamaConfig(**SIZES, intermediate_size=40),
    "scaling": transformers.GPT2Config(**SIZES, scale_attn_by_inverse_layer_idx=True),
    "mlp": transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, decoder_sparse_step=2),
}


@pytest.mark.parametrize("name", BY_PLACE)
def test_blocks_that_depend_on_their_place_are_refused(name: str) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(BY_PLACE[name])
    with pytest.raises(UnsupportedModelError, match=name):
        check_block_removal(model, find_blocks(model))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3", "mixtral"])
def test_others_are_not(family: str) -> None:
    model = families.build(family)
    check_block_removal(model, find_blocks(model))
