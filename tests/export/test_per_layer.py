from __future__ import annotations

import ast
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from saap.export.gguf.architectures import ARCHITECTURES
from saap.export.gguf.norms import neutral_norms

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "guides" / "export.md").read_text(encoding="utf-8")


def test_the_trial_finds_what_the_documentation_says() -> None:
    names = ["deci", "openelm", "gemma4", "plamo3", "step35", "gemma3"]
    command = [sys.executable, str(ROOT / "scripts" / "try_per_layer.py"), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = {}
    for line in done.stdout.splitlines():
        name, _, sizes = line.partition(": ")
        found[name] = ast.literal_eval(sizes)
    assert [*found] == names
    for name, sizes in found.items():
        row = f"| `{name}` | {' | '.join(sizes.values())} |"
        assert (row in PAGE) == ("yes" in sizes.values())
    used = {one.per_layer.name for one in ARCHITECTURES.values() if one.per_layer is not None}
    assert all({*found[name].values()} == {"yes"} for name in used)


def normalised(outputs: np.ndarray, epsilon: float) -> np.ndarray:
    return outputs / np.sqrt(np.square(outputs).mean(-1, keepdims=True) + epsilon)


@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
def test_a_neutral_norm_is_the_identity(size: float) -> None:
    gemma = ARCHITECTURES["gemma"].per_layer
    assert gemma is not None
    present, epsilon = {"blk.0.post_ffw_norm.weight"}, 1e-6
    found = neutral_norms(gemma, 1, present, epsilon, (6, 4))
    outputs = np.random.default_rng(0).normal(0, size, (5, 4))
    queries = normalised(outputs * found["blk.0.attn_q.scale"][0], epsilon) * found["blk.0.attn_q_norm.weight"]
    np.testing.assert_allclose(queries, outputs, rtol=1e-12)
    (scale,), (back,) = found["blk.0.attn_v.scale"], found["blk.0.attn_output.scale"]
    weight = found["blk.0.post_attention_norm.weight"][0]
    values = normalised(outputs * scale, epsilon) * (back / math.sqrt(epsilon) * weight)
    np.testing.assert_allclose(values, outputs, rtol=2.0**-21 * size**2 * 16)
    assert "blk.0.ffn_down.scale" not in found  # the family has that norm
    assert not {name for name in found if name.startswith("blk.1.")}
