"""Runs that are killed, interrupted or cannot write: what is left can be taken up, and nothing is half-written."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.jobs import Runner, beside, digest
from tests.pipeline import tiny

KILLS = 12


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder = tmp_path_factory.mktemp("faults")
    return Runner(tiny.folder(folder / "dense", num_hidden_layers=2), tiny.text_file(folder / "text.txt"), folder)


FULL = (5_000, 30_000)
"""Largest file in bytes: the scores, or only the weights, do not fit."""


@pytest.fixture(scope="module")
def first(runner: Runner) -> dict[str, tuple[Path, dict[str, Any]]]:
    """An undisturbed run; one that is interrupted and one on each full disk, with the run that takes it up."""
    names = ("whole", "stopped", *map(str, FULL))
    outs = {name: runner.folder / f"for-{name}" / "out" for name in names}
    jobs: dict[str, dict[str, Any]] = {"whole": {"arguments": runner.prune(outs["whole"])}}
    jobs["stopped"] = {"arguments": runner.prune(outs["stopped"]), "signal": int(signal.SIGINT), "at": 12}
    jobs |= {str(size): {"arguments": runner.prune(outs[str(size)]), "largest_file": size} for size in FULL}
    jobs |= {f"after {name}": {"arguments": runner.prune(outs[name])} for name in names[1:]}
    outs["tuned"] = runner.folder / "for-tuned" / "out"
    jobs["tuned"] = {"arguments": runner.recover(outs["tuned"])}
    jobs["unwritable"] = {"arguments": runner.prune(Path("/proc/saap/out"))}
    results = runner.run(*jobs.values())
    return {
        name: (outs.get(name.removeprefix("after "), runner.folder), result)
        for name, result in zip(jobs, results, strict=True)
    }


def kills(events: int, count: int = KILLS) -> list[int]:
    """Events spread evenly over a run at which it is killed."""
    assert events > count
    points = [round(1 + index * (events - 1) / (count - 1)) for index in range(count)]
    assert len(set(points)) == count
    return points


def check_kills(
    runner: Runner,
    command: Callable[[Path], list[str]],
    whole: Path,
    events: int,
    folder: Path,
    *,
    offloaded: bool = False,
) -> None:
    """Kill a run at each of the points and take it up: the digests are those of the run that nobody disturbed."""
    points = kills(events)
    outs = [folder / str(point) / "out" for point in points]
    jobs: list[dict[str, Any]] = []
    for point, out in zip(points, outs, strict=True):
        same: dict[str, Any] = {"arguments": command(out), "offloaded": offloaded}
        jobs += [{**same, "signal": int(signal.SIGKILL), "at": point}, same]
    results = runner.run(*jobs)
    expected = digest(whole)
    assert expected
    for point, out, killed, resumed in zip(points, outs, results[::2], results[1::2], strict=True):
        assert killed["code"] == -signal.SIGKILL, point
        if resumed["code"] == 2:  # the result was whole and in its place, and only the work folder had to go
            assert "exists" in resumed["stderr"], (point, resumed["stderr"])
            assert point > points[-3]
        else:
            assert resumed["code"] == 0, (point, resumed["stderr"])
            assert beside(out) == ["out"], point
            assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir()), point
        assert digest(out) == expected, point


def test_pruning_killed_anywhere_and_taken_up(
    runner: Runner, first: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    whole, undisturbed = first["whole"]
    assert undisturbed["code"] == 0, undisturbed["stderr"]
    assert len(digest(whole)) == 4
    check_kills(runner, runner.prune, whole, undisturbed["events"], tmp_path)


def test_tuning_killed_anywhere_and_taken_up(
    runner: Runner, first: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    whole, undisturbed = first["tuned"]
    assert undisturbed["code"] == 0, undisturbed["stderr"]
    assert len(digest(whole)) == 2
    check_kills(runner, runner.recover, whole, undisturbed["events"], tmp_path)


def test_pruning_offloaded_killed_anywhere_and_taken_up(runner: Runner, tmp_path: Path) -> None:
    # one strategy for both: a search evaluates fewer candidates with weights in files
    strategy = ("--strategy", "uniform")

    def command(out: Path) -> list[str]:
        return runner.prune(out, "--max-memory", "1B", *strategy)

    whole, here = tmp_path / "whole" / "out", tmp_path / "here" / "out"
    undisturbed, in_memory = runner.run(
        {"arguments": command(whole), "offloaded": True}, {"arguments": runner.prune(here, *strategy)}
    )
    assert undisturbed["code"] == in_memory["code"] == 0, undisturbed["stderr"]
    plans, expected = ({name: value for name, value in digest(out).items() if "plan" in name} for out in (whole, here))
    assert plans == expected
    check_kills(runner, command, whole, undisturbed["events"], tmp_path, offloaded=True)


@pytest.fixture(scope="module")
def tuned(runner: Runner) -> tuple[Path, int]:
    """An undisturbed run of all stages for two ratios, and its events."""
    out = runner.folder / "for-all-stages" / "out"
    (undisturbed,) = runner.run({"arguments": runner.all_stages(out)})
    assert undisturbed["code"] == 0, undisturbed["stderr"]
    assert sorted(path.name for path in out.iterdir()) == ["0.1", "0.3"]
    assert beside(out) == ["out"]
    return out, int(undisturbed["events"])


def test_all_stages_of_two_ratios_killed_anywhere_and_taken_up(
    runner: Runner, tuned: tuple[Path, int], tmp_path: Path
) -> None:
    check_kills(runner, runner.all_stages, tuned[0], tuned[1], tmp_path)


def test_all_stages_go_on_in_a_kept_work_folder(runner: Runner, tuned: tuple[Path, int], tmp_path: Path) -> None:
    points = kills(tuned[1], 6)[1:-1]
    jobs: list[dict[str, Any]] = []
    for point in points:
        out = tmp_path / str(point) / "out"
        same = {"arguments": runner.all_stages(out, "--work-dir", str(out.with_name("work")), "--keep-work")}
        jobs += [{**same, "signal": int(signal.SIGKILL), "at": point}, same, dict(same)]
    other = {"arguments": [*jobs[-1]["arguments"], "--seed", "7"]}
    *results, refused = runner.run(*jobs, other)
    for index, point in enumerate(points):
        out = tmp_path / str(point) / "out"
        killed, resumed, again = results[3 * index : 3 * index + 3]
        assert killed["code"] == -signal.SIGKILL
        assert (resumed["code"], again["code"]) == (0, 0), (point, resumed["stderr"], again["stderr"])
        assert digest(out) == digest(tuned[0]), point
        assert beside(out) == ["out", "work"]
        assert not [line for line in again["stdout"].splitlines() if line.startswith(("cut", "train"))]
        assert str(out / "0.3") in again["stdout"]
        assert str(out.with_name("work")) not in again["stdout"]
    assert refused["code"] == 2
    assert "other settings" in refused["stderr"]


def test_an_interrupted_run_says_so_and_leaves_no_output(first: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    out, stopped = first["stopped"]
    assert stopped["code"] == 130
    assert stopped["stderr"].startswith("interrupted: ")
    assert "Traceback" not in stopped["stderr"]
    assert first["after stopped"][1]["code"] == 0
    assert beside(out) == ["out"]
    assert digest(out) == digest(first["whole"][0])


@pytest.mark.parametrize("largest", FULL)
def test_a_full_disk(first: dict[str, tuple[Path, dict[str, Any]]], largest: int) -> None:
    out, full = first[str(largest)]
    assert full["code"] == 2, full["stderr"]
    assert full["stderr"].startswith("error: ")
    assert full["stderr"].count("\n") == 1
    assert "cannot be written" in full["stderr"]
    again = first[f"after {largest}"][1]
    assert again["code"] == 0, again["stderr"]
    assert beside(out) == ["out"]
    assert digest(out) == digest(first["whole"][0])


def test_an_output_that_cannot_be_written(first: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    refused = first["unwritable"][1]
    assert refused["code"] == 2
    assert refused["stderr"].startswith("error: ")
    assert refused["stderr"].count("\n") == 1
