"""An interrupted experiment is resumed: finished cells stay, those of other settings are measured again."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from harness import store
from harness.command import parse
from harness.driver import measure, run, state_of
from harness.experiment import Experiment, Request, Scaled
from harness.store import rounded, write_cell, write_json

CELLS = ("first", "second", "third")


class Measuring:
    """An experiment that fails at a cell, and remembers what it was asked for."""

    def __init__(self, *, fails_at: str | None = None, settings: dict | None = None) -> None:
        self.fails_at = fails_at
        self.asked: list[str] = []
        self.experiment = Experiment(
            name="made", cells=CELLS, settings=settings or {"tokens": Scaled(8, 512)}, measure=self.measure
        )  # fmt: skip

    def measure(self, request: Request, wanted: Sequence[str]) -> Iterator[tuple[str, dict]]:
        for name in wanted:
            if name == self.fails_at:
                raise KeyboardInterrupt
            self.asked.append(name)
            yield name, {"value": CELLS.index(name)}


@pytest.fixture
def request_(tmp_path) -> Request:
    return Request(quick=True, work=tmp_path / "work", results=tmp_path)


def test_an_interrupted_experiment_goes_on_with_the_next_cell(request_):
    stopped = Measuring(fails_at="second")
    with pytest.raises(KeyboardInterrupt):
        measure(stopped.experiment, request_)
    state = state_of(stopped.experiment, request_)
    assert (list(state.found), state.missing) == (["first"], ("second", "third"))
    again = Measuring()
    measure(again.experiment, request_)
    assert again.asked == ["second", "third"]
    state = state_of(again.experiment, request_)
    assert not state.missing
    assert [record["values"]["value"] for record in state.found.values()] == [0, 1, 2]


def test_a_cell_says_where_it_was_measured_and_with_what(request_, tmp_path):
    measure(Measuring().experiment, request_)
    content = json.loads((tmp_path / "made.json").read_text())
    assert content["settings"] == {"tokens": 8}
    assert content["environments"][content["cells"]["first"]["environment"]]["versions"]["torch"]
    assert content["cells"]["first"]["seconds"] >= 0
    assert content["codes"][content["cells"]["first"]["code"]].keys() == set(Measuring().experiment.decided_by)


def test_only_machines_and_code_that_a_cell_has_are_kept(request_, tmp_path):
    experiment = Measuring().experiment
    for cell, machine in (("first", "old"), ("second", "old"), ("first", "new"), ("second", "new")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "environment", partial(dict, machine=machine))
            write_cell(experiment, request_, cell, {"value": 1}, 0.0, {"core": machine})
    content = json.loads((tmp_path / "made.json").read_text())
    assert (content["environments"], content["codes"]) == ([{"machine": "new"}], [{"core": "new"}])


@pytest.mark.parametrize(
    ("flags", "folder"),
    [([], "book-smollm2"), (["--quick"], "book-quick-smollm2"), (["--model", "a/b", "--out", "o"], "book-b")],
)
def test_a_smoke_run_and_another_model_have_folders_of_their_own(monkeypatch, flags, folder):
    monkeypatch.setattr(sys, "argv", ["book.py", "run", *flags])
    assert parse()[1].work.name == folder


def test_another_model_does_not_replace_the_results(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["book.py", "run", "--model", "another"])
    with pytest.raises(SystemExit):
        parse()
    assert "--model needs --out" in capsys.readouterr().err


def test_cells_of_other_settings_are_measured_again(request_):
    measure(Measuring().experiment, request_)
    other = Measuring(settings={"tokens": 16})
    assert state_of(other.experiment, request_).missing == CELLS


def test_a_cell_can_be_measured_again(request_):
    measure(Measuring().experiment, request_)
    again = Measuring()
    measure(again.experiment, request_, ["second"])
    assert again.asked == ["second"]
    assert not state_of(again.experiment, request_).missing


def test_no_other_file_is_left(request_, tmp_path):
    measure(Measuring().experiment, request_)
    assert {path.name for path in tmp_path.iterdir()} == {"made.json"}


def test_an_experiment_may_have_a_file_for_each_cell(request_, tmp_path):
    experiment = dataclasses.replace(Measuring().experiment, own_files=True)
    measure(experiment, request_)
    found = json.loads((tmp_path / "third.json").read_text())
    assert found.pop("code").keys() == set(experiment.decided_by)
    assert found == {"value": 2}
    assert not state_of(experiment, request_).missing


def test_a_page_needs_the_cells_of_the_experiments_that_it_reads(request_):
    measure(Measuring().experiment, request_)
    other = Experiment(name="other", cells=["own"], measure=Measuring().measure)
    both = dataclasses.replace(Measuring().experiment, reads=(other,))
    assert state_of(both, request_).missing == ("own",)


def test_what_only_a_person_can_name_is_asked_for(request_, capsys):
    experiment = dataclasses.replace(Measuring().experiment, options={"tasks": "DIR"}, needs=("tasks",))
    run(experiment, request_)
    assert "run by hand: python benchmarks/book.py run made --set tasks=DIR" in capsys.readouterr().out


def test_an_experiment_without_a_small_version_is_not_tried(request_, capsys):
    run(dataclasses.replace(Measuring().experiment, smoke=False), request_)
    assert capsys.readouterr().out == ""


def test_lists_of_numbers_take_one_line_and_come_back(tmp_path):
    value = {"numbers": [1.5, 2.0], "texts": ["a, [b]", "c"], "rows": [{"x": [1, 2]}], "none": []}
    write_json(tmp_path / "file.json", value)
    text = (tmp_path / "file.json").read_text()
    assert json.loads(text) == value
    assert '"numbers": [1.5, 2.0]' in text
    assert rounded({"x": [1 / 3, 12345678912.0], "n": None, "ok": True}) == {
        "x": [0.333333333, 12345678900.0], "n": None, "ok": True,
    }  # fmt: skip


def test_settings_are_those_of_the_run():
    made = Measuring(settings={"model": "{model}", "few": Scaled([1], [1, 2]), "all": ["{model}", 3]}).experiment
    for quick, few in ((True, [1]), (False, [1, 2])):
        request = Request(quick=quick, work=Path(), results=Path(), model="tiny")
        assert made.bound(request).settings == {"model": "tiny", "few": few, "all": ["tiny", 3]}
