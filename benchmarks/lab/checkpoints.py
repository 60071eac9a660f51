"""Checkpoints in the sizes of known models, with random weights and a tokenizer of bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from saap.models.checkpoint.safetensor_files import INDEX_NAME, TensorEntry, write_tensors

VOCABULARY = 32000
LAYERS_IN_A_SHARD = 4
POOL = 2**24


@dataclass(frozen=True)
class Shape:
    """Of a LLaMA. key_heads: None for as many as query heads. tied: whether the embedding is the head too."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    vocabulary: int = VOCABULARY
    key_heads: int | None = None
    tied: bool = False

    @property
    def block_parameters(self) -> int:
        return sum(math.prod(size) for size in self.tensors(0).values())

    @property
    def parameters(self) -> int:
        tables = 1 if self.tied else 2
        return self.layers * self.block_parameters + (tables * self.vocabulary + 1) * self.hidden

    def tensors(self, layer: int) -> dict[str, tuple[int, ...]]:
        at, h, f = f"model.layers.{layer}", self.hidden, self.ffn
        keys = h // self.heads * (self.key_heads or self.heads)
        return {
            **{f"{at}.self_attn.{name}_proj.weight": (h, h) for name in "qo"},
            **{f"{at}.self_attn.{name}_proj.weight": (keys, h) for name in "kv"},
            f"{at}.mlp.gate_proj.weight": (f, h),
            f"{at}.mlp.up_proj.weight": (f, h),
            f"{at}.mlp.down_proj.weight": (h, f),
            f"{at}.input_layernorm.weight": (h,),
            f"{at}.post_attention_layernorm.weight": (h,),
        }

    def shards(self) -> Iterator[dict[str, tuple[int, ...]]]:
        yield {"model.embed_tokens.weight": (self.vocabulary, self.hidden), "model.norm.weight": (self.hidden,)}
        for first in range(0, self.layers, LAYERS_IN_A_SHARD):
            layers = range(first, min(first + LAYERS_IN_A_SHARD, self.layers))
            yield {name: size for layer in layers for name, size in self.tensors(layer).items()}
        if not self.tied:
            yield {"lm_head.weight": (self.vocabulary, self.hidden)}


SHAPES = {
    "1.5b": Shape(1536, 8960, 28, 12, vocabulary=151936, key_heads=2, tied=True),
    "7b": Shape(4096, 11008, 32, 32),
    "13b": Shape(5120, 13824, 40, 40),
}
"""LLaMA-7B and 13B of the first generation, and the sizes of Qwen2.5 1.5B."""


def random_weight(size: tuple[int, ...], pool: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Normal numbers from one pool, each tensor from a place of its own: to draw billions would take minutes."""
    if len(size) == 1:
        return torch.ones(size, dtype=pool.dtype)
    start = int(torch.randint(len(pool), (1,), generator=generator))
    count = size[0] * size[1]
    return pool.roll(start).repeat(-(-count // len(pool)))[:count].reshape(size)


def write_checkpoint(shape: Shape, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Everything but a tokenizer, shard by shard, never whole in memory."""
    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(POOL - 3, generator=generator) * 0.02).to(dtype)
    shards = list(shape.shards())
    index: dict[str, str] = {}
    for number, sizes in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        entries = {
            name: TensorEntry(dtype=dtype, shape=size, make=partial(random_weight, size, pool, generator))
            for name, size in sizes.items()
        }
        write_tensors(folder / file, entries, {"format": "pt"})
        index |= dict.fromkeys(sizes, file)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads or shape.heads, tie_word_embeddings=shape.tied,
        dtype=str(dtype).removeprefix("torch."), bos_token_id=0, eos_token_id=0, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte: what random weights are told is of no interest."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)
