"""Which family opens in which program: the tables of the conformance suite, of two experiments and of the export."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from harness.store import ROOT

from saap.export.gguf.architectures import ARCHITECTURES

FAMILIES = ROOT / "docs" / "families.md"
KINDS = {"ffn": "FFN", "heads": "attention", "experts": "experts"}
"""What was pruned for vLLM."""
YES, NO, UNTRIED = "✓", "✗", ""
MODEL_TYPES = {"llama_tied": "llama", "gemma3": "gemma3_text", "deepseek_v3_moe": "deepseek_v3", "deepseek_v3": ""}
"""Of families with another name; the dense variant of deepseek_v3 has no model type of its own."""


def matrix(summaries: Mapping[str, Mapping[str, Any] | None]) -> list[dict[str, str]]:
    """A row for each family of the conformance suite. summaries: by experiment."""
    vllm, mlx = summaries["vllm"], summaries["mlx"]
    rows = []
    for line in FAMILIES.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 10 and re.fullmatch(r"\w+", cells[0]) and cells[0] != "family":
            family, adaptive, uniform = cells[0], cells[7], cells[9]
            rows.append({
                "family": family, "transformers": YES if adaptive == "yes" else NO,
                "stock class": NO if uniform == "-" else YES,
                "vLLM": _in_vllm(vllm["rows"].get(family) if vllm else None), "MLX-LM": _in_mlx(mlx, family),
                "GGUF": _in_gguf(MODEL_TYPES.get(family, family)),
            })  # fmt: skip
    return rows


def _in_vllm(row: Mapping[str, str] | None) -> str:
    if row is None:
        return UNTRIED
    opened = [what for kind, what in KINDS.items() if row[kind] == "same"]
    return f"{YES} {', '.join(opened)}" if opened else NO


def _in_mlx(mlx: Mapping[str, Any] | None, family: str) -> str:
    if mlx is None or family not in (*mlx["rows"], *mlx["unknown"]):
        return UNTRIED
    return NO if family in mlx["unknown"] else YES


def _in_gguf(model_type: str) -> str:
    if model_type not in ARCHITECTURES:
        return NO
    return f"{YES} both layouts" if ARCHITECTURES[model_type].per_layer else f"{YES} uniform layout"
