"""The notebook of `examples/` runs from top to bottom on a tiny model, in a kernel of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.pipeline import tiny

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "saap.ipynb"
LITTLE = """
MODEL = {model!r}
PRUNE = {{"pruning_ratio": 0.3, "preset": "fast", "num_samples": 4, "sample_length": 32, "refit_tokens": 1024}}
RECOVER = {{"data": ["mixed"], "max_steps": 2, "max_seq_length": 32, "validation_samples": 1}}
PROMPT = "The"
"""


def test_it_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = LITTLE.format(model=str(tiny.folder(tmp_path / "dense", intermediate_size=192)))
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert " parameters\nperplexity " in said
    assert "bound method" not in said
    assert "tuned.gguf: " in said
    assert (tmp_path / "tuned.gguf").is_file()


def test_it_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in notebook.cells)
