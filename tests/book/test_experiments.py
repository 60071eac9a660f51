"""Every experiment runs on a tiny model from the first cell to its page, and its page says what was measured."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
from pathlib import Path

import pytest
from resultsbook.driver import measure_row, state_of
from resultsbook.pages import write_pages
from resultsbook.registry import ROWS
from resultsbook.row import Request, Row
from resultsbook.rows.boundaries import channel_order, in_order, relative_error
from resultsbook.rows.generation import TASKS, facts
from resultsbook.store import ROOT
from tests.book.test_pages import numbers_without_source
from tests.pipeline import tiny

EXPERIMENTS = [row for row in ROWS if row.experiment is not None]
FEW = {"families": ("bloom",), "calibration": 10}
"""Cells that are enough to see a row run: by name, or so many of the first."""


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> Request:
    folder = tmp_path_factory.mktemp("trial")
    model = tiny.folder(folder / "tiny", layers=6)
    return Request(quick=True, work=folder / "work", model=str(model))


def shortened(row: Row) -> Row:
    """The row with few of its cells."""
    few = FEW.get(row.name)
    if few is None or row.experiment is None:
        return row
    every = row.experiment.cells

    def cells(request: Request) -> list[str]:
        if isinstance(few, tuple):
            return list(few)
        names = list(every(request))
        return [name for name in names if name.startswith("large")][:few] + [n for n in names if n.startswith("small")][
            :few
        ]

    return dataclasses.replace(row, experiment=dataclasses.replace(row.experiment, cells=cells))


@pytest.mark.parametrize("row", EXPERIMENTS, ids=lambda row: row.name)
def test_a_trial_of_the_row_gives_its_page(row, trial, tmp_path):
    row = shortened(row)
    measure_row(row, trial, tmp_path)
    assert state_of(row, trial, tmp_path).complete
    write_pages([row], trial, tmp_path)
    page = (tmp_path / f"{row.name}.md").read_text()
    said = re.search(r'!!! abstract "Finding"\n\n    (.*)\n', page)
    summary = json.loads((tmp_path / f"{row.name}.json").read_text())["summary"]
    assert said
    assert numbers_without_source(said[1], summary) == []
    assert said[1] in (tmp_path / "index.md").read_text()
    charts = re.findall(r"\(figures/(.*?)\.svg\)", page)
    assert charts
    assert all((tmp_path / "figures" / f"{name}.svg").read_text().startswith("<svg") for name in charts)
    assert "| |" not in page.replace("|  |", "")
    assert str(Path(trial.work)) not in page


def test_open_questions_have_short_answers():
    rows = [
        {"query": "Q: 1?\nA:", "choices": ["one two three four", "x"], "label": 0},
        {"query": "Q: 2?\nA:", "choices": ["x", "water."], "label": 1},
        {"query": "Q: 3?\nA:", "choices": ["ice", "x"], "label": 0},
    ]
    open_questions = runpy.run_path(str(ROOT / "scripts" / "bundle_texts.py"))["open_questions"]
    found = [(question["prompt"], question["answer"]) for question in open_questions(map(json.dumps, rows), 5)]
    assert found == [("Q: 2?\nA:", "water"), ("Q: 3?\nA:", "ice")]
    assert len(open_questions(map(json.dumps, rows), 1)) == 1


def test_the_questions_of_the_tasks_are_there():
    sets = facts(200)
    assert {name: len(questions) for name, questions in sets.items() if name in TASKS} == dict.fromkeys(TASKS, 200)
    for name in TASKS:
        assert all(question.answer and len(question.answer.split()) <= 3 for question in sets[name])
    assert all(len(questions) == 4 for questions in facts(4).values())


def test_channels_of_like_size_lose_less_than_mixed_ones():
    import torch

    generator = torch.Generator().manual_seed(0)
    scale = torch.where(torch.arange(64) % 2 == 0, 1.0, 30.0)
    weight = torch.randn(8, 64, generator=generator) * scale
    errors = {
        order: relative_error(weight / scale, in_order(weight, order, 32) / scale) for order in ("natural", "by-size")
    }
    assert errors["by-size"] < 0.2 * errors["natural"]
    assert sorted(channel_order(weight, "random-0").tolist()) == list(range(64))
