"""Tiny models as folders for MLX-LM, and its answers from a Python that has it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tests.conformance.cases import CASES, Case, Keep, cut_copy, fits, mixed, plain, write
from tests.families import EVERY, FAMILIES

from saap.core.errors import PlanError
from saap.core.records import ModelGraph, Role
from saap.models.loading.pretrained import load

PYTHON = "SAAP_MLX_PYTHON"
"""Variable of the environment: a Python with mlx-lm, if that of the tests has none."""
WORKER = Path(__file__).with_name("mlx_worker.py")
TOKENS, TOGETHER = 256, 192
"""Positions that are compared, and how many of them MLX-LM reads at once; the others use its cache."""
# MLX-LM takes the width of Mixtral's heads from the hidden size, applies no sliding window in Mistral and Gemma 2, and
# rounds the square root of Gemma's hidden size to bfloat16: 144 has an exact one.
CHANGES: dict[str, dict[str, Any]] = {
    "mixtral": {"head_dim": 8},
    "mistral": {"sliding_window": 512},
    "gemma": {"hidden_size": 144},
    "gemma4": {"hidden_size": 144},
    "gemma2": {"hidden_size": 144, "sliding_window": 512},
    "gemma3": {
        "hidden_size": 144, "num_hidden_layers": 3, "_sliding_window_pattern": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}  # fmt: skip
_SHOWN = {
    "query heads": "query heads", "an FFN": "ffn empty", "an attention": "attention empty",
    "a block": "first block dropped", "hidden channels": "width",
}  # fmt: skip
_LENGTHS = ("max_position_embeddings", "n_positions")


def python() -> str | None:
    """The Python that has mlx-lm."""
    return sys.executable if importlib.util.find_spec("mlx_lm") is not None else os.environ.get(PYTHON)


@contextmanager
def sizes_for_mlx(family: str) -> Iterator[str]:
    """Name of the tiny family with sizes that MLX-LM can express, and room for the compared positions."""
    kind, sizes = FAMILIES[family]
    longer = {length: 2 * TOKENS for length in _LENGTHS if length in sizes}
    name = f"{family} for MLX"
    with mock.patch.dict(EVERY, {name: (kind, {**sizes, **longer, **CHANGES.get(family, {})})}):
        yield name


def pruned_folder(family: str, case: Case, out: Path) -> Path | None:
    """The tiny model cut as the case says, an adaptive folder in float32; None if it has nothing to cut so."""
    with sizes_for_mlx(family) as name:
        try:
            if not fits(name, case):
                return None
            pruned, graph, plan, structure = cut_copy(name, case)
        except PlanError:
            return None
    return write(pruned.float(), graph, plan, structure, out)


def channels(graph: ModelGraph) -> Keep:
    return {name: kept for name, kept in mixed(graph).items() if graph.group(name).role is Role.FFN}


PRUNED = {
    "FFN channels": Case("channels", channels),
    "FFN channels, KV groups": Case("channels and groups", mixed),
    **{shown: next(case for case in CASES if case.name == name) for shown, name in _SHOWN.items()},
}
"""What is pruned, in the words of a page."""


def token_ids(vocabulary: int = 128) -> list[list[int]]:
    """One window of random tokens."""
    return torch.randint(2, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(1)).tolist()


@torch.no_grad()
def next_tokens(folder: Path, windows: list[list[int]]) -> list[list[int]]:
    """The most likely next token at each position of each window in transformers, in float32."""
    model = plain(load(folder, device="cpu", dtype=torch.float32))
    return [model(torch.tensor([ids]), use_cache=False).logits[0].argmax(-1).tolist() for ids in windows]


def in_mlx(jobs: list[list[Any]], interpreter: str | None = None) -> list[Any]:
    """The worker's results."""
    chosen = interpreter or python() or ""
    # the packages of another environment are its own
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONPATH" or chosen == sys.executable
    }
    done = subprocess.run(
        [chosen, str(WORKER)], input=json.dumps(jobs), env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return list(json.loads(done.stdout))


def agreements(
    folders: Mapping[Path, Path], windows: list[list[int]], interpreter: str | None = None
) -> list[float | str]:
    """Share of equal next tokens of each folder, or why MLX-LM does not open it.

    folders: each with the one that transformers opens.
    """
    found = in_mlx([["next tokens", str(folder.resolve()), windows, TOGETHER] for folder in folders], interpreter)
    return [
        str(tokens["error"]).splitlines()[0]
        if isinstance(tokens, dict)
        else float((torch.tensor(tokens) == torch.tensor(next_tokens(reference, windows))).double().mean())
        for tokens, reference in zip(found, folders.values(), strict=True)
    ]
