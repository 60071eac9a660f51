"""Every experiment runs on a tiny model from the first cell to its page, and its page says what was measured."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from experiments.quality import comparison, experts, recovery
from experiments.quality.zero_shot import packed, unpacked
from experiments.registry import EXPERIMENTS
from harness.driver import measure, state_of
from harness.experiment import Experiment, Request
from harness.pages import summary_of, write_pages
from tests.book.test_pages import numbers_without_source
from tests.pipeline import tiny

TRIED = [one for one in EXPERIMENTS if one.smoke and one.name != "accelerator"]
FEW = {
    "families": ("bloom",), "calibration": 10, "experts": (*experts.CELLS, *experts.EXTRA),
    "teacher-logits": tuple(f"smollm2/{state}" for state in ("dense", "pruned", "in memory", "8")),
    "recovery": tuple(f"{recovery.MAIN}/{state}" for state in ("dense", "pruned", "groupwise", recovery.OWN)),
}  # fmt: skip
"""Cells that are enough for a smoke run: by name, or so many of the first."""


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> Request:
    folder = tmp_path_factory.mktemp("trial")
    model = tiny.folder(folder / "tiny", layers=6)
    return Request(quick=True, work=folder / "work", results=folder / "results", model=str(model))


def shortened(experiment: Experiment) -> Experiment:
    """The experiment with few of its cells."""
    few = FEW.get(experiment.name)
    if few is None:
        return experiment

    def cells(request: Request) -> list[str]:
        if isinstance(few, tuple):
            return list(few)
        names = experiment.names(request)
        of_each = [[name for name in names if name.startswith(kind)][:few] for kind in ("large", "small")]
        return [*of_each[0], *of_each[1]]

    return dataclasses.replace(experiment, cells=cells)


@pytest.mark.parametrize("experiment", TRIED, ids=lambda one: one.name)
def test_a_smoke_run_gives_the_page(experiment, trial, tmp_path):
    experiment = shortened(experiment)
    measure(experiment, trial)
    summary = summary_of(experiment, state_of(experiment, trial))
    assert summary is not None
    write_pages([experiment], trial, tmp_path)
    page = (tmp_path / f"{experiment.name}.md").read_text()
    said = re.search(r'!!! abstract "Finding"\n\n    (.*)\n', page)
    assert said
    assert numbers_without_source(said[1], summary) == []
    assert said[1] in (tmp_path / "index.md").read_text()
    charts = re.findall(r"\(figures/(.*?)\.svg\)", page)
    assert len(charts) == len(experiment.figures(summary))
    assert all((tmp_path / "figures" / f"{name}.svg").read_text().startswith("<svg") for name in charts)
    assert "| |" not in page.replace("|  |", "")
    assert str(Path(trial.work)) not in page


def test_every_step_on_an_accelerator_runs_with_tiny_models_and_is_kept(tmp_path, capsys):
    accelerator = next(one for one in EXPERIMENTS if one.name == "accelerator")
    request = Request(quick=True, work=tmp_path / "models", results=tmp_path)
    measure(accelerator, request)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["tests", "7b", "1.5b", "real"]
    cells = json.loads((tmp_path / "accelerator.json").read_text())["cells"]
    found = {name: cell["values"] for name, cell in cells.items()}
    for stages in (found["7b"]["stages"], found["1.5b"]["prune"]["stages"], found["1.5b"]["recover"]["stages"]):
        assert all({"seconds", "peak_device_bytes", "peak_resident_bytes"} <= stage.keys() for stage in stages)
    assert set(found["real"]["perplexity"]) == {"dense", "pruned", "tuned"}
    measure(accelerator, request)
    assert capsys.readouterr().out == ""


def test_answers_are_stored_as_one_character_each():
    row = {"tasks": {"one": {"correct": [0, 1, 1], "correct_norm": None}}, "method": "flap"}
    assert packed(row)["tasks"]["one"]["correct"] == "011"
    assert unpacked(packed(row)) == row


def test_methods_that_lack_the_same_ratios_are_compared_in_one_command():
    every = comparison.cells(Request(quick=False, work=Path(), results=Path()))
    lacking = [cell for cell in every if cell.startswith("smollm2/") and cell != "smollm2/flap/0.2/cut"]
    found = comparison.missing(lacking)
    assert list(found) == [
        ("smollm2", "cut", "0"),
        ("smollm2", "restored", "0"),
        *(("smollm2", "restored", s) for s in "12"),
    ]
    assert found["smollm2", "cut", "0"]["flap"] == ("0.1", "0.3", "0.5")
    assert found["smollm2", "cut", "0"]["saap"] == comparison.RATIOS
    assert found["smollm2", "restored", "1"] == {"saap": ("0.2",), "llm-pruner-element2@ffn": ("0.2",)}
    assert found["smollm2", "restored", "0"]["flap"] == ("0.2",)


def test_other_seeds_are_compared_with_the_same_seed():
    cells = {f"smollm2/saap/0.2/restored{seed}": {"ratio": 1.2} for seed in ("", "/1", "/2")}
    cells["smollm2/llm-pruner-element2@ffn/0.2/restored"] = {"ratio": 1.5}
    assert comparison.summarise(cells)["seeds"] == {}
    cells["smollm2/llm-pruner-element2@ffn/0.2/restored/2"] = {"ratio": 1.6}
    assert comparison.summarise(cells)["seeds"] == {"smollm2": [1.2 / 1.5, 1.2 / 1.6]}


def test_ours_is_compared_with_the_best_baseline_where_all_are_measured():
    ratios = {"saap": 1.2, **dict.fromkeys(comparison.baselines_of("smollm2", "0.2", "cut"), 1.6)}
    ratios["llm-pruner-element2@ffn"] = 1.5
    cells = {f"smollm2/{method}/0.2/cut": {"ratio": value} for method, value in ratios.items()}
    (row,) = comparison.summarise(cells)["against"]
    assert (row["best"], row["side"], row["quotient"]) == ("llm-pruner-element2@ffn", "cut only", 1.2 / 1.5)
    del cells["smollm2/flap/0.2/cut"]
    assert comparison.summarise(cells)["against"] == []
