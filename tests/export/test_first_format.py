"""A folder written by the first format version, as it lies in tests/fixtures, opens with every later version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from saap.models import modeling_pruned
from saap.models.loading import load

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "format_1"


def check(model: Any) -> None:
    expected = json.loads((FOLDER / "expected.json").read_text())
    with torch.no_grad():
        found = model(torch.tensor([expected["input_ids"]]), use_cache=False).logits[0]
    torch.testing.assert_close(found, torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-4)


def test_it_opens_with_saap() -> None:
    check(load(FOLDER, device="cpu"))


def test_it_opens_with_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    check(AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True))


def test_the_code_of_a_format_version_never_changes() -> None:
    if modeling_pruned.FORMAT_VERSION == 1:
        assert (FOLDER / "modeling_pruned.py").read_bytes() == Path(modeling_pruned.__file__).read_bytes()
    assert json.loads((FOLDER / "config.json").read_text())["pruned_structure"]["format_version"] == 1
