from __future__ import annotations

import dataclasses
import json
import shutil
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.pipeline import tiny

from saap.core.errors import ConfigurationError, OutputError
from saap.models.loading import memory
from saap.pipeline.prune import forecast as forecast_module
from saap.pipeline.prune import planning
from saap.pipeline.prune import run as run_module
from saap.pipeline.prune.forecast import check_fits
from saap.pipeline.prune.run import preview, run_prune
from saap.pipeline.shared import memory_limit, targets
from saap.pipeline.shared.context import Run
from saap.pipeline.shared.inputs import RunOptions
from saap.settings.prune import PruneConfig

SETTINGS = {"samples": 6, "sample_length": 32, "align": 8, "effort": "fast", "refit_tokens": 8192}
CUT_ONLY = {**SETTINGS, "restore": False, "refit_tokens": None}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("dense"))


@pytest.mark.parametrize("kind", ["a text of the user's own", "the default"])
def test_the_stages_are_those_of_the_run(source: Path, tmp_path: Path, kind: str) -> None:
    text = str(tiny.text_file(tmp_path / "text.txt")) if kind != "the default" else "mixed"
    config = PruneConfig(pruning_ratios=(0.2,), calibration=(text,), **SETTINGS)
    options = RunOptions(out=tmp_path / "out")
    shown = preview(source, config, options)["forecast"]
    assert not list(tmp_path.glob("out*"))
    (result,) = run_prune(source, config, options)
    assert [stage["name"] for stage in shown["stages"]] == [stage.name for stage in result.report.stages]
    assert all(stage["seconds"] is not None for stage in shown["stages"])
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert written * 0.9 < shown["disk_bytes"] < written * 2
    assert shown["seconds"] == pytest.approx(sum(stage["seconds"] or 0 for stage in shown["stages"]))
    assert shown["peak_resident_bytes"] > written


def test_every_ratio_is_made_and_measured(source: Path, tmp_path: Path) -> None:
    config = PruneConfig(pruning_ratios=(0.1, 0.3), **CUT_ONLY)
    stages = preview(source, config, RunOptions(out=tmp_path / "out"))["forecast"]["stages"]
    assert sum(stage["name"].startswith("cut, block by block (") for stage in stages) == 2
    assert sum(stage["name"].startswith("search the structure (") for stage in stages) == 2


@pytest.mark.parametrize(
    ("more", "stage", "passes"),
    [
        ({"strategy": "second-order"}, "estimate the importance and the second-order cost of every unit", 4.3 * 6 * 32),
        ({"effort": "default"}, "search the structure", 16 * 128 * 12),
        ({}, "estimate the importance of every unit", 3.5 * 6 * 32),
        ({"restore": False, "refit_tokens": None}, "cut, block by block", 0),
    ],
)
def test_seconds_follow_from_the_tokens_and_the_time_of_one(
    source: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], stage: str, passes: float
) -> None:
    monkeypatch.setattr(forecast_module, "_seconds_of_token", lambda run: 0.5)
    config = PruneConfig(pruning_ratios=(0.2,), **{**SETTINGS, **more})
    stages = preview(source, config, RunOptions())["forecast"]["stages"]
    assert [one["seconds"] for one in stages if one["name"] == stage] == [0.5 * passes]


def test_what_the_restoration_takes_grows_with_its_text(source: Path) -> None:
    peaks = {}
    for tokens in (1024, 65536):
        config = PruneConfig(pruning_ratios=(0.2,), **{**SETTINGS, "refit_tokens": tokens})
        stages = preview(source, config, RunOptions())["forecast"]["stages"]
        peaks[tokens] = {stage["name"]: stage["peak_resident_bytes"] for stage in stages}
    name = "cut and restore, block by block"
    by_token = 4 * (4 * 32 + 96 // 2)
    assert peaks[65536][name] - peaks[1024][name] == pytest.approx(64512 * by_token, rel=0.2)


def probed(
    peaks: dict[str, int], restore: bool = True, out: Path | None = None
) -> tuple[forecast_module.Forecast, Run]:
    stages = tuple(
        forecast_module.StageForecast(name=name, seconds=1.0, peak_resident_bytes=peak) for name, peak in peaks.items()
    )
    found = forecast_module.Forecast(stages=stages, refit_tokens=8192, bytes_per_refit_token=1e6)
    config = PruneConfig(pruning_ratios=(0.2,), restore=restore)
    nothing = dict.fromkeys(field.name for field in dataclasses.fields(Run))
    loaded = SimpleNamespace(model=torch.nn.Linear(1, 1))
    return found, Run(**{**nothing, "config": config, "loaded": loaded, "options": RunOptions(out=out)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("free", "others", "restore", "remedy"),
    [
        (7 * 10**9, 10**9, True, "--refit-tokens 5120"),
        (11 * 10**8, 10**9, True, "--no-restore"),
        (5 * 10**8, 10**9, True, "a machine with more memory"),
        (5 * 10**8, 10**9, False, "a machine with more memory"),
    ],
)
def test_too_little_memory_names_the_flag_that_helps(
    monkeypatch: pytest.MonkeyPatch, free: int, others: int, restore: bool, remedy: str
) -> None:
    monkeypatch.setattr(memory, "of_machine", lambda: free)
    found, run = probed({"load the model": others, "cut and restore, block by block": 92 * 10**8}, restore)
    with pytest.raises(ConfigurationError, match=remedy):
        check_fits(found, run)
    monkeypatch.setattr(memory, "of_machine", lambda: 93 * 10**8)
    check_fits(found, run)


def test_too_little_memory_of_an_accelerator_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found, run = probed({"load the model": 1})
    stage = dataclasses.replace(found.stages[0], peak_device_bytes=92 * 10**8)
    found = dataclasses.replace(found, stages=(stage,))
    monkeypatch.setattr(memory, "of_device", lambda device: 9 * 10**9)
    with pytest.raises(ConfigurationError, match=r"'load the model' needs 9\.2 GB .* 9\.0 GB are free on cpu"):
        check_fits(found, run)
    monkeypatch.setattr(memory, "of_device", lambda device: 10**10)
    check_fits(found, run)


def test_weights_that_do_not_fit_are_not_read(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "of_machine", lambda: 1000)
    with pytest.raises(ConfigurationError, match=r"The model .* needs"):
        preview(source, PruneConfig(pruning_ratios=(0.2,), **SETTINGS), RunOptions())


@pytest.mark.parametrize(
    ("settings", "free", "suggested"),
    [
        ({}, 10**15, True), ({}, 10**6, False),
        ({"method": "magnitude", "refit_tokens": None}, 10**15, False),
        ({"roles": ("block",)}, 10**15, False), ({"vocabulary_size": 300}, 10**15, False),
    ],
)  # fmt: skip
def test_offloading_is_suggested_where_it_is_possible(
    source: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], free: int, suggested: bool
) -> None:
    monkeypatch.setattr(memory, "of_machine", lambda: free)
    config = PruneConfig(pruning_ratios=(0.2,), **{**SETTINGS, **settings})
    remedy = memory_limit.offloading_remedy(source, config, RunOptions())
    assert remedy.startswith("Leave out --dry-run, and use --max-memory ") is suggested


@pytest.mark.parametrize("small", ["weights", "stages"])
def test_a_dry_run_suggests_offloading(source: Path, monkeypatch: pytest.MonkeyPatch, small: str) -> None:
    monkeypatch.setattr(run_module, "offloading_remedy", lambda *given: "Use --max-memory 1GB")
    monkeypatch.setattr(memory, "of_machine", lambda: 1000)
    if small == "stages":
        monkeypatch.setattr(run_module, "check_weights_fit", lambda *given: None)
    with pytest.raises(ConfigurationError, match="--max-memory 1GB"):
        preview(source, PruneConfig(pruning_ratios=(0.2,), **CUT_ONLY), RunOptions())


def test_too_little_disk_is_refused(tmp_path: Path) -> None:
    found, run = probed({"load the model": 1}, out=tmp_path / "out")
    stage = dataclasses.replace(found.stages[0], disk_bytes=10**18)
    with pytest.raises(OutputError, match="MB free"):
        check_fits(dataclasses.replace(found, stages=(stage,)), run)


@pytest.mark.parametrize(
    ("free", "fits"),
    [({"work": 300, "out": 300}, True), ({"work": 100, "out": 300}, False), ({"work": 300, "out": 200}, False)],
)
def test_space_is_checked_where_the_files_will_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: dict[str, int], fits: bool
) -> None:
    for disk in free:
        (tmp_path / disk).mkdir()
    usage = namedtuple("usage", "free")
    spare = 64 * 1024**2
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(free[folder.name] + spare))
    monkeypatch.setattr(targets, "_disk_of", lambda path: path.parent.name)
    options = RunOptions(out=tmp_path / "out" / "small", work_dir=tmp_path / "work" / "stages")
    with nullcontext() if fits else pytest.raises(OutputError, match="MB free"):
        targets.check_space(options, [150, 100], 20)


def test_a_run_in_memory_checks_the_disk_before_the_estimation(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(64 * 1024**2 + 20_000))  # the spare, and little more
    monkeypatch.setattr(planning, "estimate", lambda *a, **k: pytest.fail("the estimation began"))
    for ratio in (0.2, 0.3):  # the first run leaves no folder that would reject the settings of the second
        with pytest.raises(OutputError, match="MB free"):
            run_prune(source, PruneConfig(pruning_ratios=(ratio,), **SETTINGS), RunOptions(out=tmp_path / "out"))
        assert list(tmp_path.iterdir()) == []


def test_the_forecast_of_a_given_plan_has_its_sizes(source: Path, tmp_path: Path) -> None:
    written = {}
    for kept in (96, 8):
        plan = tmp_path / f"{kept}.json"
        groups = {f"layers.{layer}.ffn": {"kept": kept} for layer in range(4)}
        plan.write_text(json.dumps({"format_version": 1, "groups": groups}))
        written[kept] = preview(source, PruneConfig(plan=plan, **SETTINGS), RunOptions())["forecast"]["disk_bytes"]
    assert written[96] - written[8] == 4 * 88 * 3 * 32 * 4  # layers, channels, matrices, their width, bytes


def test_memory_of_this_machine() -> None:
    assert (memory.of_machine() or 10**9) > 10**8
