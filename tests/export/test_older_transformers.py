"""Folders written with the installed transformers open in 4.57, in a process of its own, and give the same logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.conformance.cases import Case, plan_for, uniform_keep, write
from tests.export.gguf_models import adaptive_folder, family_model
from tests.export.test_tokenizers import READER as TOKENIZER_READER
from tests.export.test_tokenizers import TEXT, every_kind

from saap.core.records import Layout, Role
from saap.discovery import discover
from saap.models.loading.pretrained import load
from saap.surgery.cut import cut

OLDER = ("transformers>=4.57,<4.58", "huggingface-hub>=0.34,<1.0", "tokenizers>=0.22,<0.23")
IDS = [[5, 9, 2, 77, 31, 8, 120, 64]]
READER = """
import json, sys, torch, transformers
from transformers import AutoModel, AutoModelForCausalLM
sys.modules["saap"] = None  # not installed where this folder is read
ids = torch.tensor(json.loads(sys.argv[1]))
found = {"version": transformers.__version__}
for folder in sys.argv[2:]:
    # eager: Gemma 2 caps its attention scores, which the other implementations leave out
    options = {"trust_remote_code": "adaptive" in folder, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        found[folder] = model(ids, use_cache=False).logits.tolist()
    if "adaptive" in folder:  # without its head
        with torch.no_grad():
            last = model(ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
            assert torch.equal(AutoModel.from_pretrained(folder, **options).eval()(ids, use_cache=False)[0], last)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert written.shape[1] > ids.shape[1]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables of a process that sees the older version first, and everything else as it is here."""
    at = tmp_path_factory.mktemp("older")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(at), *OLDER]
    subprocess.run(install, check=True, capture_output=True, text=True)
    return {**os.environ, "PYTHONPATH": str(at), "HF_MODULES_CACHE": str(at / "modules"), "HF_HUB_OFFLINE": "1"}


def uniform_folder(at: Path, name: str, **changes: Any) -> Path:
    """The family's tiny model with fewer FFN channels, the same number in every layer: the stock class."""
    family_model(name, **changes).save_pretrained(at / "dense")
    model = load(at / "dense", device="cpu")
    graph = discover(model)
    keep = uniform_keep(graph, Role.FFN)
    plan = plan_for(graph, Case("uniform", lambda _: keep), Layout.UNIFORM)
    return write(model, graph, plan, cut(model, graph, plan), at / "out")


def test_both_layouts_open_in_an_older_version(tmp_path: Path, older: dict[str, str]) -> None:
    fewer = {0: tuple(range(0, 80, 3)), 1: tuple(range(16))}
    folders = [
        adaptive_folder(tmp_path / f"adaptive-{name}", name, ffn=fewer, attention={1: (0, 2)})
        for name in ("llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "opt")
    ]
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    }
    kinds: dict[str, Any] = {"layer_types": ["full_attention", "sliding_attention"], "rope_parameters": rope}
    folders.append(uniform_folder(tmp_path / "uniform-gemma3", "gemma3", **kinds))
    folders += [uniform_folder(tmp_path / f"uniform-{name}", name) for name in ("llama", "qwen2", "mistral")]
    done = subprocess.run(
        [sys.executable, "-c", READER, json.dumps(IDS), *map(str, folders)],
        env=older, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["version"].startswith("4.57") != transformers.__version__.startswith("4.57")
    apart = {}
    for folder in folders:
        with torch.no_grad():
            here = load(folder, device="cpu")(torch.tensor(IDS), use_cache=False).logits
        apart[folder.parent.name] = float((torch.tensor(found[str(folder)]) - here).abs().max() / here.abs().max())
    assert max(apart.values()) < 1e-5, apart


def test_each_kind_of_tokenizer_opens_in_an_older_version_without_a_question(
    tmp_path: Path, older: dict[str, str]
) -> None:
    model_folder = adaptive_folder(tmp_path / "model", "llama", ffn={0: (1, 2)}, attention={})
    folders = every_kind(model_folder, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", TOKENIZER_READER, TEXT, "{}", *map(str, folders)],
        stdin=subprocess.DEVNULL, env=older, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == list(folders.values())
