from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from tests import command
from tests.pipeline import tiny
from tests.reporting.comparison import comparison

from saap.baselines.baseline import Measurements
from saap.core.errors import CalibrationError, ConfigurationError, OutputError, StaleInputError, TargetError
from saap.core.evaluation_records import Comparison
from saap.discovery import discover
from saap.models.walk.backend import Backend
from saap.pipeline.compare import run
from saap.pipeline.prune.baselines import baseline_of
from saap.pipeline.shared.inputs import RunOptions
from saap.reporting.comparison_tables import comparison_table
from saap.reporting.tables import write_table
from saap.settings.compare import CompareRequest
from saap.settings.evaluate import EvalRequest
from saap.settings.prune import MethodChoice, PruneConfig
from saap.settings.registry import Method


def compare(*arguments: Any) -> dict[str, Any]:
    """The content of `comparison.json`, as it is returned and as it lies in the folder."""
    result = run.compare(*arguments)
    assert Comparison.model_validate_json((arguments[-1] / "comparison.json").read_bytes()) == result
    content: dict[str, Any] = result.model_dump(mode="json")
    return content


METHODS = (Method.SAAP, Method.LLM_PRUNER_ELEMENT1, Method.FLAP, Method.MAGNITUDE)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("dense"))


def request_for(folder: Path, **changes: object) -> CompareRequest:
    rows = [{"query": f"Question: {n}?\nAnswer:", "choices": ["yes", "no"], "label": n % 2} for n in range(6)]
    folder = folder / "tasks"
    folder.mkdir(exist_ok=True)
    (folder / "made.test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PruneConfig(
        pruning_ratios=(0.1, 0.2), calibration=("novels",), samples=4, sample_length=32, refit_tokens=1024, align=8,
        effort="fast",
    )  # fmt: skip
    evaluation = EvalRequest(texts=("bundled",), window=64, max_tokens=512, tasks=("made",), task_data=folder)
    request = {"methods": tuple(MethodChoice(method=method) for method in METHODS), "config": config}
    return CompareRequest(**{**request, "evaluation": evaluation, **changes})


@pytest.fixture(scope="module")
def done(source, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("compare")
    return folder, compare(source, request_for(folder), RunOptions(device="cpu"), folder / "out")


def test_every_row_is_there_with_as_many_parameters(done) -> None:
    _, result = done
    rows = result["rows"]
    assert len(rows) == len(METHODS) * 2 * 2
    largest_step = 32 * (16 + 8 + 8 + 16)  # one KV group with its two query heads
    for ratio in (0.1, 0.2):
        plain = [row for row in rows if row["ratio"] == ratio and row["method"] != "flap"]
        counts = [row["parameters"] for row in plain]
        assert max(counts) - min(counts) <= largest_step
        assert all(row["pruning_ratio"] >= ratio for row in rows if row["ratio"] == ratio)
    assert all(row["ratios"]["bundled"] > 0 and row["tasks"]["made"]["questions"] == 6 for row in rows)
    assert {row["restored"] for row in rows} == {False, True}
    assert all(set(row["seconds"]) == {"score", "search", "make"} for row in rows)
    for method in METHODS:  # one search, whether its plan is reconstructed or only cut
        assert len({row["seconds"]["search"] for row in rows if row["method"] == method}) == 1


def test_rows_that_are_there_are_not_made_again_and_more_can_be_added(source, done) -> None:
    folder, result = done
    out = folder / "out"
    files = {path: path.stat().st_mtime_ns for path in (out / "rows").iterdir()}
    changed = json.loads(next(iter(files)).read_text())
    methods = tuple(MethodChoice(method=method) for method in (*METHODS, Method.RANDOM))
    again = compare(source, request_for(folder, methods=methods), RunOptions(device="cpu"), out)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert changed in [*again["rows"], again["dense"]]
    assert len(again["rows"]) == len(result["rows"]) + 4


def test_rows_of_earlier_passes_stay_and_tasks_can_be_asked_later(source, tmp_path) -> None:
    one = (MethodChoice(method=Method.MAGNITUDE),)
    config = request_for(tmp_path).config.model_copy(update={"pruning_ratios": (0.1,)})
    plain = request_for(tmp_path, methods=one, config=config, restorations=(False,), task_ratios=())
    first = compare(source, plain, RunOptions(device="cpu"), tmp_path / "out")
    assert (len(first["rows"]), first["rows"][0]["tasks"]) == (1, {})
    other = plain.model_copy(update={"methods": (MethodChoice(method=Method.RANDOM),)})
    second = compare(source, other, RunOptions(device="cpu"), tmp_path / "out")
    assert [row["method"] for row in second["rows"]] == ["random", "magnitude"]
    with_tasks = plain.model_copy(update={"task_ratios": (0.1,)})
    third = compare(source, with_tasks, RunOptions(device="cpu"), tmp_path / "out")
    assert [list(row["tasks"]) for row in third["rows"]] == [["made"], []]
    assert third["rows"][0]["ratios"] == first["rows"][0]["ratios"]
    strange = plain.model_copy(update={"task_ratios": (0.3,)})
    with pytest.raises(ConfigurationError, match="which is not compared"):
        compare(source, strange, RunOptions(device="cpu"), tmp_path / "out")


def test_a_comparison_without_tasks_takes_some_up_later_and_no_others(source, tmp_path) -> None:
    one = (MethodChoice(method=Method.MAGNITUDE),)
    asking = request_for(tmp_path, methods=one, restorations=(False,), task_ratios=(0.1,))
    bare = asking.evaluation.model_copy(update={"tasks": (), "task_data": None})
    first = compare(source, asking.model_copy(update={"evaluation": bare}), RunOptions(device="cpu"), tmp_path / "out")
    assert (first["dense"]["tasks"], [row["tasks"] for row in first["rows"]]) == ({}, [{}, {}])
    untouched = next((tmp_path / "out" / "rows").glob("magnitude-0.2-*"))
    before = untouched.stat().st_mtime_ns
    later = compare(source, asking, RunOptions(device="cpu"), tmp_path / "out")
    assert [list(row["tasks"]) for row in (later["dense"], *later["rows"])] == [["made"], ["made"], []]
    assert untouched.stat().st_mtime_ns == before
    fewer = asking.model_copy(update={"evaluation": asking.evaluation.model_copy(update={"limit": 2})})
    with pytest.raises(StaleInputError, match=r"made from files, all questions; this run has .* the first 2 questions"):
        compare(source, fewer, RunOptions(device="cpu"), tmp_path / "out")


def test_rows_of_other_settings_are_not_taken_for_these(source, done) -> None:
    folder, _ = done
    config = request_for(folder).config.model_copy(update={"samples": 5})
    with pytest.raises(StaleInputError, match="another -o"):
        compare(source, request_for(folder, config=config), RunOptions(device="cpu"), folder / "out")


def test_rows_of_a_changed_text_are_not_taken_for_these(source, tmp_path) -> None:
    text = tiny.text_file(tmp_path / "text.txt")
    asking = request_for(tmp_path, methods=(MethodChoice(method=Method.RANDOM),), restorations=(False,), task_ratios=())
    one = {"pruning_ratios": (0.1,)}
    for changes in (
        {"config": asking.config.model_copy(update={**one, "calibration": (str(text),)})},
        {
            "config": asking.config.model_copy(update=one),
            "evaluation": asking.evaluation.model_copy(update={"texts": (str(text),), "tasks": (), "task_data": None}),
        },
    ):
        out, wanted = tmp_path / f"out-{len(changes)}", asking.model_copy(update=changes)
        first = compare(source, wanted, RunOptions(device="cpu"), out)
        assert compare(source, wanted, RunOptions(device="cpu"), out)["rows"] == first["rows"]
        text.write_text(text.read_text()[1:])
        with pytest.raises(StaleInputError, match="another -o"):
            compare(source, wanted, RunOptions(device="cpu"), out)


def test_an_unknown_calibration_costs_no_measurement(source, tmp_path) -> None:
    request = request_for(tmp_path)
    config = request.config.model_copy(update={"calibration": (str(tmp_path / "typo.txt"),)})
    with pytest.raises(CalibrationError, match="typo"):
        compare(source, request.model_copy(update={"config": config}), RunOptions(device="cpu"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_baselines_are_not_calibrated_on_images(source, tmp_path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"image": "a.png", "text": "a"}) + "\n")
    request = request_for(tmp_path)
    config = request.config.model_copy(update={"calibration": (str(pairs),)})
    with pytest.raises(CalibrationError, match="llm-pruner-element1 does not support image-text pairs"):
        compare(source, request.model_copy(update={"config": config}), RunOptions(device="cpu"), tmp_path / "out")


def test_two_comparisons_do_not_share_a_folder(source, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / "lock"), pytest.raises(OutputError, match="Another run is at work"):
        compare(source, request_for(tmp_path), RunOptions(device="cpu"), out)
    assert not (out / "rows").exists()


def test_tables(done) -> None:
    folder, result = done
    out = folder / "out"
    headings, rows = table = comparison_table(Comparison.model_validate(result))
    assert all(len(row) == len(headings) for row in rows)
    paths = write_table(table, out / "comparison")
    assert {path.suffix for path in paths} == {".csv", ".md", ".tex"}
    read = list(csv.reader((out / "comparison.csv").read_text().splitlines()))
    assert read == [headings, *rows]


def test_refusals_come_before_the_model_is_read(tmp_path) -> None:
    nowhere = tmp_path / "nowhere"
    request = request_for(tmp_path, evaluation=EvalRequest())
    with pytest.raises(ConfigurationError, match="no text"):
        compare(nowhere, request, RunOptions(), tmp_path / "out")
    with pytest.raises(ConfigurationError, match="--methods is empty"):
        request_for(tmp_path, methods=())
    with pytest.raises(ConfigurationError, match="attention and query, which cannot be combined"):
        request_for(tmp_path, methods="saap@attention+query")
    whole = request_for(tmp_path, methods="block-influence@ffn", evaluation=EvalRequest(texts=("bundled",)))
    with pytest.raises(ConfigurationError, match="always removes block, not ffn"):
        compare(nowhere, whole, RunOptions(), tmp_path / "out")
    assert request_for(tmp_path, methods="flap@ffn").methods[0].label == "flap@ffn"


@pytest.mark.parametrize(("method", "role"), [("magnitude@hidden", "hidden"), ("wanda-sp@expert", "expert")])
def test_roles_that_a_method_cannot_score_are_refused_before_the_scoring(source, tmp_path, method, role) -> None:
    with pytest.raises(ConfigurationError, match=f"does not score units of the role {role}"):
        compare(source, request_for(tmp_path, methods=method), RunOptions(device="cpu"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_query_heads_are_compared_with_other_roles(source, tmp_path) -> None:
    config = request_for(tmp_path).config.model_copy(update={"pruning_ratios": (0.05,), "roles": ("ffn",)})
    request = request_for(
        tmp_path, methods="random@query,block-influence", config=config, restorations=(False,), task_ratios=()
    )
    rows = compare(source, request, RunOptions(device="cpu"), tmp_path / "out")["rows"]
    assert [row["method"] for row in rows] == ["random@query", "block-influence"]
    assert all(row["pruning_ratio"] >= 0.05 for row in rows)


def test_other_kinds_of_structures_are_added_to_a_comparison(source, tmp_path) -> None:
    """Query heads are part of another graph, and whole blocks have no importance."""
    options, evaluation = RunOptions(device="cpu"), EvalRequest(texts=("bundled",), window=64, max_tokens=512)
    config = request_for(tmp_path).config.model_copy(update={"pruning_ratios": (0.05,)})
    for label in ("magnitude", "saap@query", "saap@block"):
        one = request_for(tmp_path, methods=label, config=config, evaluation=evaluation, restorations=(False,))
        rows = compare(source, one, options, tmp_path / "out")["rows"]
    assert {row["method"] for row in rows} == {"magnitude", "saap@query", "saap@block"}


def test_a_finished_comparison_reads_no_text(done, source, monkeypatch) -> None:
    folder, _ = done
    monkeypatch.setattr(run, "draw_tokens", None)
    compare(source, request_for(folder), RunOptions(device="cpu"), folder / "out")


def test_a_ratio_that_one_method_cannot_reach_is_refused_first(source, tmp_path) -> None:
    config = request_for(tmp_path).config.model_copy(update={"pruning_ratios": (0.9,)})
    with pytest.raises(TargetError, match="cannot be removed"):
        compare(source, request_for(tmp_path, config=config), RunOptions(device="cpu"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_methods_of_other_seeds_stay_at_a_ratio() -> None:
    rows = [
        {**comparison()["rows"][0], "method": method, "seed": seed} for method, seed in (("a", 0), ("c", 1), ("a", 1))
    ]
    found = Comparison.model_validate({**comparison(), "rows": rows}).at_ratio(0.1)
    assert [(row.method, row.seed) for row in found] == [("a", 0), ("c", 1)]


def test_measurements_that_no_method_needs_any_more_are_forgotten() -> None:
    made = Measurements(Backend(tiny.model(), discover(tiny.model())), torch.arange(2, 22)[None])
    flap, magnitude = baseline_of(Method.FLAP), baseline_of(Method.MAGNITUDE)
    first = made.of(flap)
    made.keep_only([flap, magnitude])
    assert made.of(flap) is first
    made.keep_only([magnitude])
    assert made.of(flap) is not first


def test_the_command(source, tmp_path, capsys) -> None:
    arguments = [
        "compare", source, "--out", tmp_path / "c", "--methods", "magnitude,random", "--pruning-ratio", "0.1",
        "--restore", "no", "--window", "64", "--max-tokens", "256", "--samples", "4", "--sample-length", "32",
        "--refit-tokens", "1024", "--align", "8", "--effort", "fast", "--json",
    ]  # fmt: skip
    code, out, error = command.run(capsys, *arguments)
    assert code == 0, error
    assert [row["method"] for row in json.loads(out)["rows"]] == ["magnitude", "random"]
    assert (tmp_path / "c" / "comparison.md").read_text().startswith("| method |")
