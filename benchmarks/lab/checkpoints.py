"""Checkpoints in the sizes of known models, with random weights and a tokenizer of bytes."""

import copy
import json
import os
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from harness.experiment import Values
from huggingface_hub import split_torch_state_dict_into_shards
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

from lab.commands import peak_of, timed_saap
from saap.models.checkpoint.safetensor_files import INDEX_NAME, TensorEntry, write_tensors
from saap.models.loading.pretrained import open_skeleton
from saap.models.loading.references import resolve_model

POOL = 2**24


def llama(
    hidden: int, ffn: int, layers: int, heads: int, vocabulary: int = 32000, *, keys: int | None = None,
    tied: bool = False,
) -> LlamaConfig:  # fmt: skip
    """Configuration of a LLaMA. keys: KV heads, if fewer than query heads. tied: whether the embedding is the head."""
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=keys or heads, tie_word_embeddings=tied, bos_token_id=0,
        eos_token_id=0, architectures=["LlamaForCausalLM"],
    )  # fmt: skip


SHAPES = {
    "1.5b": llama(1536, 8960, 28, 12, 151936, keys=2, tied=True),
    "7b": llama(4096, 11008, 32, 32),
    "13b": llama(5120, 13824, 40, 40),
}
"""LLaMA-7B and 13B of the first generation, and the sizes of Qwen2.5 1.5B."""


def experts_30b(layers: int) -> Qwen3MoeConfig:
    """Configuration of Qwen3-30B-A3B, which has 48 layers, with fewer of them."""
    return Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        norm_topk_prob=True, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
        architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip


def skeleton(shape: PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
        return model


def parameters_of(shape: PretrainedConfig) -> int:
    return sum(parameter.numel() for parameter in skeleton(shape).parameters())


def random_weight(size: torch.Size, pool: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Normal numbers from one pool at different offsets, since drawing billions would take minutes."""
    if len(size) == 1:
        return torch.ones(size, dtype=pool.dtype)
    start = int(torch.randint(len(pool), (1,), generator=generator))
    count = size.numel()
    return pool.roll(start).repeat(-(-count // len(pool)))[:count].reshape(size)


def as_published(shape: PretrainedConfig) -> dict[str, torch.Tensor]:
    """Tensors of the checkpoint by name, without values; experts one by one, as published checkpoints have them."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in skeleton(shape).named_parameters():  # lists a tied weight once
        path, _, last = name.rpartition(".experts.")
        if not path:
            found[name] = tensor
            continue
        parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
        for expert, stacked in enumerate(tensor):
            for part, matrix in zip(parts, stacked.chunk(len(parts)), strict=True):
                found[f"{path}.experts.{expert}.{part}.weight"] = torch.empty_like(matrix)
    return found


def write_checkpoint(shape: PretrainedConfig, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """The folder with weights, configuration and tokenizer, written if missing, one tensor in memory at a time."""
    if (folder / "tokenizer.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(POOL - 3, generator=generator) * 0.02).to(dtype)
    tensors = as_published(shape)
    shards = split_torch_state_dict_into_shards(tensors, max_shard_size="2GB")
    for file, names in shards.filename_to_tensors.items():
        makers = {name: partial(random_weight, tensors[name].shape, pool, generator) for name in names}
        entries = {n: TensorEntry(dtype=dtype, shape=tuple(tensors[n].shape), make=m) for n, m in makers.items()}
        write_tensors(folder / file, entries, {"format": "pt"})
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": shards.tensor_to_filename}))
    config = copy.deepcopy(shape)
    config.dtype = dtype
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)  # last: marks the checkpoint as complete
    return folder


def cost_of_pruning(shape: PretrainedConfig, flags: Sequence[str]) -> Values:
    """Write the checkpoint, prune it in a process of its own, open the result without its weights, delete both."""
    with tempfile.TemporaryDirectory() as temporary:
        source, out = Path(temporary) / "dense", Path(temporary) / "pruned"
        start = time.perf_counter()
        write_checkpoint(shape, source)
        written, load = time.perf_counter() - start, os.getloadavg()[0]
        report, seconds, used = timed_saap("prune", source, *flags, "--out", out)
        open_skeleton(resolve_model(out), torch.bfloat16)  # checks that every weight exists in the right size
        result_bytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return {
        "layers": shape.num_hidden_layers, "parameters": parameters_of(shape),
        "removed_share_of_blocks": report["pruning_ratio"],
        "seconds": seconds, "processor_seconds": used, "checkpoint_seconds": written,
        "peak_resident_bytes": peak_of(report), "result_bytes": result_bytes, "stages": report["stages"],
        "loads": [load, os.getloadavg()[0]],
    }  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, which suffices for random weights."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)
