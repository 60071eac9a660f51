"""What people do with a folder after pruning: adapters, compilation, other types and devices, lm-eval."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tests.export.gguf_models import EMPTY, adaptive_folder, family_folder
from transformers import AutoModelForCausalLM

import saap
import saap.auto
from saap.models.loading.pretrained import load

IDS = torch.arange(3, 19).reshape(2, 8)
HALF = tuple(range(0, 80, 2))


@pytest.fixture(scope="module", params=["adaptive", "uniform"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp(request.param)
    if request.param == "uniform":
        return family_folder(at / "out", "llama", intermediate_size=40)
    return adaptive_folder(at, "llama", ffn={0: HALF, 2: EMPTY}, attention={1: (0, 2)})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).logits.float()


def test_an_adapter_trains_is_saved_and_merges(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(load(folder, device="cpu"), LoraConfig(r=4, target_modules="all-linear"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is None for name, p in model.named_parameters() if "lora" not in name)
    trained = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(folder, device="cpu"), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), trained, rtol=1e-4, atol=1e-4)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged", device="cpu")), logits(merged))


def test_peft_finds_the_base_of_an_adapter(folder: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder)
    settings = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base, settings).save_pretrained(tmp_path)
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(found), logits(load(folder, device="cpu")))


def test_modules_of_an_adapter_can_be_named_where_some_are_gone(folder: Path, tmp_path: Path) -> None:
    model = load(folder, device="cpu")
    gone = saap.removed_modules(model)
    assert {name.rpartition(".")[2] for name in gone} <= {"gate_proj", "up_proj", "down_proj"}
    assert bool(gone) == (type(model).__name__ == "SaapPrunedForCausalLM")
    settings = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], exclude_modules=gone, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, settings)
    names = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    assert len(names) == 2 * model.config.num_hidden_layers - bool(gone)
    adapted(IDS, labels=IDS, use_cache=False).loss.backward()
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(folder, device="cpu"), tmp_path)
    torch.testing.assert_close(logits(again), logits(adapted))


def test_the_compiled_model_computes_the_same(folder: Path) -> None:
    model = load(folder, device="cpu")
    compiled = torch.compile(model, backend="aot_eager")  # traces as every backend does, and needs no C compiler
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)


def test_bfloat16_computes_nearly_the_same(folder: Path, tmp_path: Path) -> None:
    exact = logits(load(folder, device="cpu", dtype=torch.float32))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    close = torch.nn.functional.cosine_similarity(logits(model), exact, dim=-1)
    assert float(close.min()) > 0.99
    model.save_pretrained(tmp_path)
    again = load(tmp_path, device="cpu")
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, "disk"])
def test_a_device_map_places_the_layers(folder: Path, tmp_path: Path, device_map: Any) -> None:
    if device_map == "disk":
        device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    torch.testing.assert_close(logits(model), logits(load(folder, device="cpu")))
    out = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape[1] > IDS.shape[1]


ROOT = Path(__file__).parents[2]
HARNESS = """
import runpy
from tests import found
found.index_tasks_once()
runpy.run_module("lm_eval", run_name="__main__", alter_sys=True)
"""
TASK = """
task: which
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_the_command_of_lm_eval_runs_on_the_folder(folder: Path, tmp_path: Path) -> None:
    rows = [{"question": f"{n} and one is", "choices": [" two", " three"], "answer": n % 2} for n in range(4)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "which.yaml").write_text(TASK.replace("FILE", str(data)))
    arguments = f"pretrained={folder},trust_remote_code=True,dtype=float32"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path)}
    done = subprocess.run(
        [
            sys.executable, "-c", HARNESS, "--model", "hf", "--model_args", arguments, "--tasks", "which",
            "--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "2",
            "--output_path", str(tmp_path / "o"),
        ],
        env={**os.environ, **offline, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (results,) = (tmp_path / "o").rglob("results_*.json")
    assert 0 <= json.loads(results.read_text())["results"]["which"]["acc,none"] <= 1
