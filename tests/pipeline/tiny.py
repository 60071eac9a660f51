"""A tiny LLaMA with a tokenizer of its own, as a folder that any consumer could have written."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from saap.data.texts import evaluation_text

VOCABULARY = 320


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer.from_str(_trained())
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")


@cache
def _trained() -> str:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator([evaluation_text()[:20000]], trainer)
    return str(inner.to_str())


def model(layers: int = 4, **changes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024,
    }  # fmt: skip
    config = LlamaConfig(**{**sizes, **changes}, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval()


def folder(at: Path, **changes: int) -> Path:
    model(**changes).save_pretrained(at)
    tokenizer().save_pretrained(at)
    return at


def mixture_folder(at: Path) -> Path:
    """A tiny Qwen3-MoE of eight experts in each layer."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(at)
    tokenizer().save_pretrained(at)
    return at


def text_file(at: Path, characters: int = 60000) -> Path:
    at.write_text(evaluation_text()[:characters])
    return at
