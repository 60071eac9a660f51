"""Small models of several families, trained here on public-domain text: real weights, made in minutes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness.experiment import Request
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from saap.data.samples import token_stream
from saap.data.texts import read_documents

VOCABULARY = 2048
END = "<|end|>"
HEADS = 4
EXPERTS, CHOSEN = 16, 4
"""Experts of each layer and of each token in a mixture; those of a token are together as wide as another's FFN."""
SHORT_CHARACTERS = 200_000
FEW_STEPS = ["--max-steps", "2", "--max-seq-length", "64", "--validation-samples", "1"]
"""Of `saap recover` in a smoke run."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Model sizes and training length. Tokens per step: batch x length."""

    layers: int = 6
    width: int = 192
    inner: int = 768
    length: int = 128
    batch: int = 16
    steps: int = 600
    rate: float = 3e-3


FULL = Size()
TRIAL = Size(layers=3, width=32, inner=128, length=64, batch=4, steps=12)


def configuration(family: str, size: Size, vocabulary: int) -> Any:
    """A configuration of the family with these sizes and no dropout."""
    heads = {"num_attention_heads": HEADS, "num_hidden_layers": size.layers, "hidden_size": size.width}
    grouped = {**heads, "num_key_value_heads": HEADS // 2, "intermediate_size": size.inner}
    window = {"max_position_embeddings": 512}
    sizes: Mapping[str, Mapping[str, Any]] = {
        "gpt2": {
            "n_embd": size.width, "n_layer": size.layers, "n_head": HEADS, "n_inner": size.inner, "n_positions": 512,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        },
        "opt": {**heads, **window, "ffn_dim": size.inner, "word_embed_proj_dim": size.width, "dropout": 0.0},
        "bloom": {"hidden_size": size.width, "n_layer": size.layers, "n_head": HEADS},
        "llama": {**grouped, **window},
        "mixtral": {
            **grouped, **window, "intermediate_size": size.inner // CHOSEN, "num_local_experts": EXPERTS,
            "num_experts_per_tok": CHOSEN, "output_router_logits": True,
        },
        "qwen3": {**grouped, **window, "head_dim": size.width // HEADS},
    }  # fmt: skip
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return AutoConfig.for_model(family, vocab_size=vocabulary, tie_word_embeddings=True, **ids, **sizes[family])


FAMILIES = ("gpt2", "opt", "bloom", "llama", "qwen3")


def make_tokenizer(text: str, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet)
    inner.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, bos_token=END, pad_token=END)


def rate_at(step: int, steps: int, highest: float) -> float:
    """Learning rate of a step: warm-up over the first twentieth, then cosine decay to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return highest * (step + 1) / warm
    way = (step - warm) / max(1, steps - warm)
    return highest * (0.1 + 0.45 * (1 + math.cos(math.pi * way)))


def batches(tokens: np.ndarray, size: Size, seed: int) -> Any:
    """Random windows of the text, `steps` batches of (batch, length) ids."""
    generator = np.random.default_rng(seed)
    for _ in range(size.steps):
        starts = generator.integers(0, len(tokens) - size.length, size=size.batch)
        yield torch.from_numpy(np.stack([tokens[start : start + size.length] for start in starts]))


def train(model: nn.Module, tokens: np.ndarray, size: Size, seed: int) -> list[float]:
    """Train on random windows of the text. Returns the loss of each step in nats."""
    return fit(model, ({"input_ids": batch, "labels": batch} for batch in batches(tokens, size, seed)), size)


def fit(model: nn.Module, given: Iterable[Mapping[str, Tensor]], size: Size) -> list[float]:
    """Plain AdamW on the model's own loss. given: model inputs of each step. Returns the loss of each step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.rate, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for step, batch in enumerate(given):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, size.steps, size.rate)
        loss: Tensor = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def trained_folder(request: Request, family: str, seed: int = 0) -> Path:
    """The folder of a trained model of the family, created if missing: about ten minutes on one core."""
    folder = request.work / f"{family}-{'trial' if request.quick else 'trained'}-{seed}"
    if not (folder / "config.json").is_file():
        train_into(folder, family, TRIAL if request.quick else FULL, seed, short=request.quick)
    return folder


def train_into(folder: Path, family: str, size: Size, seed: int = 0, *, short: bool = False) -> None:
    """Train a model of the family with its own tokenizer, and save both. short: only on a part of the text."""
    text = "\n\n".join(read_documents("mixed"))[: SHORT_CHARACTERS if short else None]
    tokenizer = make_tokenizer(text)
    tokens = token_stream([text], tokenizer)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(configuration(family, size, len(tokenizer)))
    losses = train(model, tokens, size, seed)
    if getattr(model.config, "output_router_logits", False):
        model.config.output_router_logits = False  # for the training's loss of the routing alone
    save_trained(folder, family, losses, model, tokenizer)


def save_trained(folder: Path, name: str, losses: Sequence[float], *parts: Any) -> None:
    """Save a model with its tokenizer or processor atomically, and print its training loss."""
    print(f"{name}: loss {losses[0]:.2f} -> {np.mean(losses[-10:]):.2f}", flush=True)
    unfinished = folder.with_name(folder.name + ".part")
    for part in parts:
        part.save_pretrained(unfinished)
    unfinished.rename(folder)
