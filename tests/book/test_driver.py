"""A row that was interrupted is taken up: finished cells stay, those of other settings are measured again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from resultsbook.driver import measure_row, run_row, state_of
from resultsbook.row import Experiment, Request, Row, Source
from resultsbook.store import cell_file

CELLS = ("first", "second", "third")


class Measuring:
    """An experiment that fails at a cell, and remembers what it was asked for."""

    def __init__(self, *, fails_at: str | None = None, settings: dict | None = None) -> None:
        self.fails_at = fails_at
        self.asked: list[str] = []
        self.experiment = Experiment(
            cells=lambda request: CELLS, settings=lambda request: settings or {"tokens": 8}, measure=self.measure
        )
        self.row = Row(
            name="made", title="Made", question="?", summarise=dict, figures=lambda summary: (),
            experiment=self.experiment,
        )  # fmt: skip

    def measure(self, request: Request, wanted: Sequence[str]) -> Iterator[tuple[str, dict]]:
        for name in wanted:
            if name == self.fails_at:
                raise KeyboardInterrupt
            self.asked.append(name)
            yield name, {"value": CELLS.index(name)}


@pytest.fixture
def request_(tmp_path) -> Request:
    return Request(quick=True, work=tmp_path / "work")


def test_an_interrupted_row_goes_on_with_the_next_cell(request_, tmp_path):
    stopped = Measuring(fails_at="second")
    with pytest.raises(KeyboardInterrupt):
        measure_row(stopped.row, request_, tmp_path)
    state = state_of(stopped.row, request_, tmp_path)
    assert (list(state.found), state.missing, state.complete) == (["first"], ("second", "third"), False)
    again = Measuring()
    measure_row(again.row, request_, tmp_path)
    assert again.asked == ["second", "third"]
    state = state_of(again.row, request_, tmp_path)
    assert state.complete
    assert [record["values"]["value"] for record in state.found.values()] == [0, 1, 2]


def test_a_cell_says_where_it_was_measured_and_with_what(request_, tmp_path):
    measure_row(Measuring().row, request_, tmp_path)
    record = json.loads(cell_file(tmp_path, "made", "first").read_text())
    assert record["settings"] == {"tokens": 8}
    assert record["environment"]["versions"]["torch"]
    assert record["seconds"] >= 0


def test_cells_of_other_settings_are_measured_again(request_, tmp_path):
    measure_row(Measuring().row, request_, tmp_path)
    other = Measuring(settings={"tokens": 16})
    assert state_of(other.row, request_, tmp_path).missing == CELLS


def test_a_file_that_was_cut_off_is_not_left_as_a_cell(request_, tmp_path):
    measure_row(Measuring().row, request_, tmp_path)
    assert {path.name for path in cell_file(tmp_path, "made", "first").parent.iterdir()} == {
        f"{name}.json" for name in CELLS
    }


def test_other_benchmarks_are_not_run_for_a_trial_nor_by_hand(request_, tmp_path, capsys):
    source = Source(file="not-there.json", command="python benchmarks/not-there.py THING", by_hand=True)
    row = dataclasses.replace(Measuring().row, experiment=None, sources={"one": source})
    run_row(row, request_, tmp_path)
    assert capsys.readouterr().out == ""
    run_row(row, dataclasses.replace(request_, quick=False), Path(tmp_path))
    assert "to be run by hand: python benchmarks/not-there.py THING" in capsys.readouterr().out
