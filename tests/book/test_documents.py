"""The README, the article and the chart of the front page say what was measured."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
from pathlib import Path

import pytest
from experiments import formats, front
from harness.digests import MAKING, code_file, digests, place_of, record_equal, stale, stale_folders
from harness.documents import CHART, PAGES, PART, WHOLE, documents, filled, points_digest
from harness.driver import measure
from harness.experiment import Request
from harness.pages import templates
from harness.store import ROOT, finished_cells
from lab import commands
from tests.book.test_driver import Measuring
from tests.book.test_pages import EXPERIMENTS, REQUEST, summary


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    summaries = {one.name: summary(one.name) for one in EXPERIMENTS}
    return {path.as_posix(): text for path, text in documents(summaries, REQUEST).items()}


@pytest.mark.parametrize("name", [*PAGES, *(path.as_posix() for path in WHOLE.values())])
def test_a_page_says_what_was_measured(made, name):
    assert (ROOT / name).read_text(encoding="utf-8") == made[name], "run `python benchmarks/book.py render`"


def test_the_chart_shows_what_was_measured(made):
    """By its digest: drawings differ between versions of matplotlib."""
    digest = f"<!-- points: {points_digest(front.points(REQUEST))} -->"
    assert digest in made[CHART.as_posix()]
    assert digest in (ROOT / CHART).read_text(encoding="utf-8"), "run `python benchmarks/book.py render`"


def test_the_chart_is_readable_on_light_and_dark_pages(made):
    chart = made[CHART.as_posix()]
    assert "prefers-color-scheme:dark" in chart
    assert "currentColor" in chart
    assert all(name in chart for name in front.METHODS.values())


@pytest.mark.parametrize(("name", "number"), [("front.md.jinja", r"\d+"), ("findings.md.jinja", r"\d+\.\d+")])
def test_no_measured_number_is_typed(name, number):
    """The findings have whole numbers of the paper."""
    source = (ROOT / "benchmarks" / "harness" / "templates" / name).read_text(encoding="utf-8")
    prose = re.sub(r"\{[{%#].*?[}%#]\}|\[[^\]]*\]\([^)]*\)", "", source, flags=re.DOTALL)
    assert re.findall(number, prose.replace("WikiText-2", "")) == []


def test_a_part_is_replaced_between_its_marks_only():
    values = {"front": {"runs": [], "removed": 0.2}, "found": {}}
    page = "before\n<!-- results: runs -->\nold\n<!-- end of results -->\nafter 1.5\n"
    new = filled(page, values)
    assert "old" not in new
    assert (new.startswith("before\n<!-- results: runs -->\n"), new.endswith("results -->\nafter 1.5\n")) == (
        True,
        True,
    )
    assert filled(new, values) == new


def test_every_mark_has_its_block():
    blocks = templates().get_template("front.md.jinja").blocks
    named = {found[1] for name in PAGES for found in PART.findall((ROOT / name).read_text(encoding="utf-8"))}
    assert named == set(blocks)


def test_the_time_of_a_recorded_run_is_read(tmp_path, monkeypatch):
    lines = [{"command": "saap prune"}, [1.0, "o", "took 271 s, at most 2.0 GB"], [1.1, "o", " of memory\r\nopen it"]]
    monkeypatch.setattr(front, "RECORDING", tmp_path / "terminal.cast.gz")
    assert front.session() is None
    (tmp_path / "terminal.cast.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    session = front.session()
    assert session == {"command": "saap prune", "seconds": 271.0, "memory": "2.0"}
    text = filled("<!-- results: demo -->\n<!-- end of results -->\n", {"front": {"session": session}})
    assert "](docs/front/terminal.svg)" in text
    assert "271 s and 2.0 GB" in text


def test_formats_know_all_families():
    rows = formats.matrix({"vllm": summary("vllm"), "mlx": summary("mlx")})
    found = {row["family"]: row for row in rows}
    assert len(found) == len(rows) > 40
    assert found["llama"]["GGUF"].endswith("both layouts")
    assert found["llama"]["vLLM"].startswith(formats.YES)
    assert found["mpt"]["vLLM"] == found["mpt"]["MLX-LM"] == formats.NO
    untried = formats.matrix({"vllm": None, "mlx": None})
    assert {row["vLLM"] for row in untried} == {formats.UNTRIED}


def test_a_cell_of_other_code_is_stale(tmp_path, monkeypatch):
    request = Request(quick=True, work=tmp_path / "work", results=tmp_path)
    one = dataclasses.replace(Measuring().experiment, decided_by=("surgery", "settings/prune.py"))
    measure(one, request)
    assert list(stale(finished_cells(one, request), one.decided_by)) == []
    now = digests(one.decided_by)
    monkeypatch.setattr("harness.digests.digests", lambda parts: {**now, "surgery": "other"})
    assert [reason for _, reason in stale(finished_cells(one, request), one.decided_by)] == [
        "with other code in surgery"
    ] * 3


def test_a_cell_without_a_digest_is_listed():
    cells = {"first": {}, "second": {"code": digests(["data"])}}
    assert list(stale(cells, ["data"])) == [("first", "before digests were kept")]
    assert list(stale(cells, ["data", "core"]))[1:] == [("second", "before digests were kept of core")]


def test_code_that_computes_the_same_leaves_cells_current(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.digests.EQUAL", tmp_path / "equal.json")
    now = digests(["data", "core"])
    cells = {name: {"code": {**now, "data": name}} for name in ("first", "second", "other")}
    record_equal({**now, "data": "first"}, {**now, "data": "second"})
    record_equal({**now, "data": "second"}, now)
    assert [name for name, _ in stale(cells, ["data", "core"])] == ["other"]
    record_equal({**now, "data": "first"}, {**now, "data": "other"})  # so that it is as good as the second
    assert [name for name, _ in stale(cells, ["data", "core"])] == []


def test_code_that_is_edited_during_a_run_makes_its_cells_stale(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.digests.ROOT", tmp_path)
    module = tmp_path / "benchmarks" / "lab" / "module.py"
    module.parent.mkdir(parents=True)
    module.write_text("before = 1")

    def measuring(request, wanted):
        yield "first", {"value": 1}
        module.write_text("after = 2")
        yield "second", {"value": 2}

    made = Measuring().experiment
    one = dataclasses.replace(made, cells=["first", "second"], measure=measuring, decided_by=("benchmarks/lab",))
    request = Request(quick=True, work=tmp_path / "work", results=tmp_path)
    measure(one, request)
    assert [name for name, _ in stale(finished_cells(one, request), one.decided_by)] == ["first", "second"]


def test_a_folder_that_other_code_made_stays_and_is_listed(tmp_path, monkeypatch):
    runs = []

    def make(_, words, start):
        manifest = Path(words[words.index("--out") + 1]) / "saap" / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.touch()
        runs.append(words)

    monkeypatch.setattr(commands, "in_own_process", make)
    request = Request(quick=True, work=tmp_path, results=tmp_path)
    folder = commands.made_by_saap(request, "adaptive/0.2", "prune", "MODEL")
    assert list(stale_folders(tmp_path)) == []
    code_file(folder).write_text(json.dumps({**digests(MAKING), "surgery": "other"}))
    assert commands.made_by_saap(request, "adaptive/0.2", "prune", "MODEL") == folder
    assert len(runs) == 1
    assert list(stale_folders(tmp_path)) == [(str(folder), "with other code in surgery")]
    code_file(folder).unlink()
    assert list(stale_folders(tmp_path)) == [(str(folder), "before digests were kept")]


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda one: one.name)
def test_what_decides_an_experiment_is_there(experiment):
    assert [part for part in experiment.decided_by if not place_of(part).exists()] == []
    assert "benchmarks/lab" in experiment.decided_by
