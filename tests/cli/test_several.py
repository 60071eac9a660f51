"""`saap prune` in several processes: the results of one, and one end for all."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.cli.jobs import Runner, beside
from tests.pipeline import tiny

from saap.core.records import FloatArray, ImportanceScores
from saap.core.storage import read_scores

SEARCHED = ["--effort", "default", "--num-samples", "10", "--refit-tokens", "8192", "--json"]
Results = dict[str, tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("several")
    runner = Runner(
        tiny.folder(folder / "dense", num_hidden_layers=2, initializer_range=0.3),
        tiny.text_file(folder / "text.txt"),
        folder,
    )
    jobs: dict[str, dict[str, Any]] = {}

    def job(name: str, *more: str, after: str = "", **changes: Any) -> None:
        out = folder / f"for-{after or name}" / "out"
        jobs[name] = {"arguments": [*runner.prune(out), "--pruning-ratio", "0.3", *more], "out": out, **changes}

    for count in (1, 2, 4):
        job(f"searched {count}", *SEARCHED, processes=count)
    job("whole")
    job("few 1", "--num-samples", "3")
    job("few 4", "--num-samples", "3", processes=4)
    bad = {"processes": 2, "rank": 1, "at": 1}
    job("error", **bad, error="Calibration sample 2 is bad")
    job("killed", **bad, signal=int(signal.SIGKILL))
    job("later", processes=2, at=40, error="The first process is unwell")
    job("after killed", after="killed", processes=2)
    job("after later", after="later")
    job("refused", "--num-samples", "many", processes=2)
    job("dry", "--dry-run", processes=2)
    outs = {name: one.pop("out") for name, one in jobs.items()}
    results = runner.run(*jobs.values())
    return {name: (outs[name], result) for name, result in zip(jobs, results, strict=True)}


def scores_in(out: Path) -> ImportanceScores:
    return read_scores(out / "saap" / "scores.safetensors")


def arrays(scores: ImportanceScores) -> dict[str, FloatArray]:
    parts = ("vector", "vector_m2", "element", "element_m2", "comoment")
    return {f"{name} {part}": getattr(group, part) for name, group in scores.groups.items() for part in parts}


def largest_difference(found: FloatArray, expected: FloatArray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    ("one", "more"), [("searched 1", f"searched {count}") for count in (2, 4)] + [("few 1", "few 4")]
)
def test_the_scores_plan_and_restoration_of_one_process(several: Results, one: str, more: str) -> None:
    (expected, alone), (found, together) = several[one], several[more]
    assert alone["codes"] == [0], alone["stderr"]
    assert set(together["codes"]) == {0}, together["stderr"]
    wanted, got = scores_in(expected), scores_in(found)
    np.testing.assert_allclose(got.losses, wanted.losses, rtol=1e-6)
    for name, values in arrays(wanted).items():
        assert largest_difference(arrays(got)[name], values) <= 1e-6, name
    plans = [json.loads((out / "saap" / "plan.json").read_text()) for out in (expected, found)]
    trails = [plan.pop("trail") for plan in plans]
    assert plans[0] == plans[1]
    assert [candidate["name"] for candidate in trails[0]] == [candidate["name"] for candidate in trails[1]]
    for candidate, other in zip(*trails, strict=True):
        assert other["loss"] == pytest.approx(candidate["loss"], rel=1e-4)
    weights = [load_file(out / "model.safetensors") for out in (expected, found)]
    for name, weight in weights[0].items():
        assert largest_difference(weights[1][name], weight) <= 1e-4, name
    assert beside(found) == ["out"]


def test_restoration_sees_the_text_of_all_processes(several: Results) -> None:
    errors = [json.loads(several[f"searched {count}"][1]["stdout"])["refit_errors"] for count in (1, 2, 4)]
    assert min(errors[0].values()) < 0.9
    for found in errors[1:]:
        assert found == pytest.approx(errors[0], rel=1e-3)


def test_only_the_first_process_speaks(several: Results) -> None:
    alone, together = several["few 1"][1], several["few 4"][1]
    titles = [[line for line in result["stdout"].splitlines() if line.endswith(" ...")] for result in (alone, together)]
    assert len(titles[0]) > 5
    assert titles[0] == titles[1]
    assert together["stdout"].count("kept units per layer") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("error", "error: Calibration sample 2 is bad. Mend it.\n"),
        ("later", "error: The first process is unwell. Mend it.\n"),
        ("refused", "error: --num-samples 'many' is not a whole number"),
        ("dry", "error: `saap prune --dry-run` runs in one process. Start it without torchrun or accelerate launch.\n"),
    ],
)
def test_all_end_with_the_message_of_the_one_that_failed(several: Results, name: str, message: str) -> None:
    out, result = several[name]
    assert result["codes"] == [2, 2]
    assert result["stderr"].startswith(message)
    assert result["stderr"].count("\n") == 1
    if name == "error":  # the others were taken up, or made nothing
        assert beside(out) == ["out.saap-work"]
    if name in ("refused", "dry"):
        assert not out.parent.exists()


def test_all_end_when_one_is_killed(several: Results) -> None:
    result = several["killed"][1]
    assert result["codes"] == [2, -signal.SIGKILL]
    assert result["stderr"].startswith("error: Another process of this run has ended")
    assert result["stderr"].count("\n") == 1


@pytest.mark.parametrize("name", ["killed", "later"])
def test_a_failed_run_is_taken_up_by_any_number_of_processes(several: Results, name: str) -> None:
    out, again = several[f"after {name}"]
    assert set(again["codes"]) == {0}, again["stderr"]
    assert beside(out) == ["out"]
    plans = [json.loads((folder / "saap" / "plan.json").read_text()) for folder in (out, several["whole"][0])]
    assert plans[0] == plans[1]
