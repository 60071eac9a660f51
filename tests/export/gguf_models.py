"""Tiny models with a tokenizer, as folders to export: whole families, and LLaMAs whose layers differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tests.export.llama import plan_of
from tests.export.test_checkpoint import manifest
from tests.families import EVERY, randomised
from tests.pipeline import tiny

from saap.core.records import Role
from saap.discovery import discover
from saap.export.gguf.result import GgufExport
from saap.export.huggingface import CheckpointParts, write_checkpoint
from saap.models.loading.pretrained import load
from saap.pipeline.export.run import export_gguf
from saap.surgery.cut import cut

# More than the tiny tokenizer has, as Qwen 2 adds a token of its own.
ROWS = 352
EMPTY: tuple[int, ...] = ()
EXACT = 1e-6


def family_model(name: str, **changes: Any) -> Any:
    """The family's tiny model with room for the tiny tokenizer, float32."""
    kind, sizes = EVERY[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**sizes, "vocab_size": ROWS, **changes})
    return randomised(transformers.AutoModelForCausalLM.from_config(config)).float()


def family_folder(at: Path, name: str, **changes: Any) -> Path:
    family_model(name, **changes).save_pretrained(at)
    tiny.tokenizer().save_pretrained(at)
    return at


def adaptive_folder(
    at: Path, name: str, *, ffn: dict[int, tuple[int, ...]], attention: dict[int, tuple[int, ...]], **changes: Any
) -> Path:
    """The family's tiny model with these units kept in these layers."""
    family_model(name, **changes).save_pretrained(at / "dense")
    model = load(at / "dense", device="cpu")
    graph = discover(model)
    keep = {}
    for role, kept in ((Role.FFN, ffn), (Role.ATTENTION, attention)):
        for group in graph.of_role(role):
            if group.layer in kept:
                keep[group.name] = kept[group.layer]
    plan = plan_of(graph, keep)
    parts = CheckpointParts(
        graph=graph, plan=plan, structure=cut(model, graph, plan), manifest=manifest(), tokenizer=tiny.tokenizer()
    )
    return write_checkpoint(model, parts, at / "out", dtype=torch.float32)


def same_in_llama_cpp(folder: Path, out: Path, share: float = 1.0) -> GgufExport:
    """The file of a folder in full precision, in which llama.cpp computes the same.

    share: least one of equal predictions.
    """
    done = export_gguf(folder, out, quantization="f32")
    assert done.agreement is not None
    assert done.agreement.share >= share
    assert abs(done.agreement.divergence) < EXACT
    return done
