"""A folder written by the first format version, as it lies in tests/fixtures, opens with every later version."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from saap.models.checkpoint import modeling_pruned
from saap.models.loading.pretrained import load

CODE = {
    1: "f89df60f01986a9a9133b45d59f6f24a420891d4cbb67a8b1412e52021b2d642",
    2: "6dcc93b7acc62e60eb7bf41213fc51988fc5bdc3350e6bdca1b33459329de63a",
    3: "f9ba36cd03ac39601542863df507875e02d24205e4cb3a7e23009e8bab1f13bd",
    4: "b70ef66d5937dd02a5a5bd3921094de0c18b370422b37299db916c7a2a08e78a",
    5: "57afa6c2ad3f6f1e96a6551d6297f2c07f80fecfa0e496463a1f15c460a5c567",
    6: "c8a461ded1b04deaeef45e6a465f16ba361502294994f71163c3d46441403011",
}
"""SHA-256 of modeling_pruned.py by format version."""

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


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_code_of_a_format_version_never_changes() -> None:
    """Other code is another version: raise FORMAT_VERSION and add its digest."""
    assert digest(FOLDER / "modeling_pruned.py") == CODE[1]
    assert digest(Path(modeling_pruned.__file__)) == CODE[modeling_pruned.FORMAT_VERSION]
    assert json.loads((FOLDER / "config.json").read_text())["pruned_structure"]["format_version"] == 1
