"""The experiment that compares vLLM with transformers; vLLM itself runs where `make vllm` has installed it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from experiments.quality import vllm
from harness.experiment import Request
from lab.vllm_runs import ENVIRONMENT, compared, said, vllm_python, worker
from tests.families import FAMILIES

from saap.models.loading.pretrained import load


def test_every_family_of_the_conformance_suite_is_run() -> None:
    assert tuple(FAMILIES) == vllm.CELLS


def test_a_missing_environment_is_named(tmp_path: Path) -> None:
    request = Request(quick=True, work=tmp_path, results=tmp_path, given={"python": str(tmp_path / "python")})
    with pytest.raises(SystemExit, match="run `make vllm` first"):
        vllm_python(request)


def test_errors_do_not_hold_what_differs_from_run_to_run(tmp_path: Path) -> None:
    text = f"\nNo {tmp_path}/x in <class 'transformers_modules.out.5dee.modeling_pruned.SaapPrunedModel'>\nmore"
    pydantic = "1 validation error for ModelConfig\n  Value error, It is not compatible. [type=value_error, input={}]"
    assert said(pydantic, tmp_path) == "It is not compatible."
    assert said(text, tmp_path) == "No FOLDER/x in <class 'modeling_pruned.SaapPrunedModel'>"


@pytest.mark.parametrize("kind", vllm.KINDS)
def test_every_kind_is_a_folder_that_opens(tmp_path: Path, kind: str) -> None:
    dense = vllm.dense_folder(tmp_path / "dense", "mixtral" if kind == vllm.EXPERTS else "llama")
    folder = vllm.pruned_folder(dense, tmp_path / "pruned", kind)
    assert folder is not None
    structure = json.loads((folder / "config.json").read_text()).get("pruned_structure", {})
    assert bool(structure) == (kind != vllm.EXPERTS)
    assert bool(structure.get("added_biases")) == (kind == "biases")
    assert bool(structure.get("constant")) == kind.startswith("no ")
    model = load(folder, device="cpu")
    assert sum(weight.numel() for weight in model.parameters()) != sum(
        weight.numel() for weight in load(dense, device="cpu").parameters()
    )


@pytest.mark.skipif(not ENVIRONMENT.is_dir(), reason="vLLM's environment is not installed (`make vllm`)")
def test_vllm_computes_the_same(tmp_path: Path) -> None:
    dense = vllm.dense_folder(tmp_path / "dense", "qwen2")
    folder = vllm.pruned_folder(dense, tmp_path / "pruned", "heads")
    assert folder is not None
    with worker(str(ENVIRONMENT / "bin" / "python")) as runs:
        assert vllm.agrees(compared(runs, folder))
