"""Prunes checkpoints of the shape of LLaMA-7B and LLaMA-13B, with random weights, on this machine.

    python benchmarks/shapes.py 7b [--layers N] [--folder DIR] [flags of `saap prune`]
    python benchmarks/shapes.py 13b
    python benchmarks/shapes.py --table                 # the table in benchmarks/README.md, from benchmarks/results

Writes a bfloat16 checkpoint (shard by shard, never whole in memory), runs `saap prune` on it in a process of its own,
opens what came out without its weights, and deletes both. What the model computes is of no interest here: only whether
it fits, and how long it takes. Disk space is checked first. Writes benchmarks/results/shapes-NAME.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from readme_tables import write_between_marks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from saap.models.checkpoint.safetensor_files import INDEX_NAME, TensorEntry, write_tensors
from saap.models.loading.pretrained import open_skeleton
from saap.models.loading.references import resolve_model

RESULTS = Path(__file__).resolve().parent / "results"
FLAGS = [
    "--pruning-ratio", "0.2", "--samples", "10", "--sample-length", "64", "--effort", "fast", "--no-restore",
    "--max-memory", "6GB",
]  # fmt: skip
VOCABULARY = 32000
LAYERS_IN_A_SHARD = 4
POOL = 2**24
SPARE_BYTES = 2 * 10**9


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
    """Everything but a tokenizer."""
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


def needed_bytes(shape: Shape) -> int:
    """The checkpoint, the cut blocks in the work folder, and the result."""
    dense = 2 * shape.parameters
    left = dense - round(0.2 * 2 * shape.layers * shape.block_parameters)
    return dense + 2 * left


def prune(source: Path, out: Path, flags: list[str]) -> tuple[dict[str, Any], float, float]:
    """The report, and wall-clock and processor seconds of the whole command."""
    command = [sys.executable, "-m", "saap", "prune", str(source), *flags, "--out", str(out), "--json"]
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds, after = time.perf_counter() - start, os.times()
    used = after.children_user - before.children_user + after.children_system - before.children_system
    return dict(json.loads(done.stdout)), seconds, used


def measure(name: str, layers: int | None, folder: Path, flags: list[str]) -> dict[str, Any]:
    whole = SHAPES[name]
    shape = replace(whole, layers=layers or whole.layers)
    needed, free = needed_bytes(shape) + SPARE_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise SystemExit(
            f"{folder} needs {needed / 1e9:.1f} GB for this shape, but has {free / 1e9:.1f} GB free: "
            f"{(needed - free) / 1e9:.1f} GB are missing. Use --folder."
        )
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        source, out = Path(inside) / "dense", Path(inside) / "pruned"
        source.mkdir()
        start = time.perf_counter()
        write_checkpoint(shape, source)
        byte_tokenizer().save_pretrained(source)
        written = time.perf_counter() - start
        load = os.getloadavg()[0]
        report, seconds, used = prune(source, out, flags)
        open_skeleton(resolve_model(out), torch.bfloat16)  # every weight is there, in the size that its model has
        result_bytes = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    stages = report["stages"]
    return {
        "shape": name,
        "layers": shape.layers,
        "command": "saap prune CHECKPOINT " + " ".join(flags),
        "parameters": shape.parameters,
        "removed_share_of_blocks": report["pruning_ratio"],
        "seconds": seconds,
        "processor_seconds": used,
        "checkpoint_seconds": written,
        "peak_resident_bytes": max(stage["peak_resident_bytes"] for stage in stages),
        "result_bytes": result_bytes,
        "stages": stages,
        "environment": {
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load_before": load,
            "load_after": os.getloadavg()[0],
        },
    }  # fmt: skip


def table() -> str:
    rows = ["| shape | layers | parameters | time, min | processor time, min | peak memory, GB | load average |"]
    rows.append("|---|---|---|---|---|---|---|")
    for file in sorted(RESULTS.glob("shapes-*.json")):
        found: Mapping[str, Any] = json.loads(file.read_text())
        loads = found["environment"]
        rows.append(
            f"| LLaMA-{found['shape'].upper()} | {found['layers']} | {found['parameters'] / 1e9:.2f} x 10^9 "
            f"| {found['seconds'] / 60:.1f} | {found['processor_seconds'] / 60:.1f} "
            f"| {found['peak_resident_bytes'] / 1e9:.2f} | {loads['load_before']:.1f} to {loads['load_after']:.1f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", nargs="?", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--table", action="store_true")
    chosen, flags = parser.parse_known_args()
    if chosen.shape is not None:
        result = measure(chosen.shape, chosen.layers, chosen.folder, flags or FLAGS)
        name = chosen.shape + (f"-{chosen.layers}-layers" if chosen.layers else "")
        (RESULTS / f"shapes-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({key: result[key] for key in ("seconds", "processor_seconds", "peak_resident_bytes")}))
    write_between_marks("shapes", table())


if __name__ == "__main__":
    main()
