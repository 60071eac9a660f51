"""What the pages say is what was measured: no number is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from experiments.registry import EXPERIMENTS
from harness.driver import State, state_of
from harness.experiment import Request
from harness.pages import TEMPLATES, block, index_page, page_of, product_defaults, summary_of
from harness.store import RESULTS

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "results"
REQUEST = Request(quick=False, work=ROOT / "out" / "book", results=RESULTS)
STATES = {one.name: state_of(one, REQUEST) for one in EXPERIMENTS}
MEASURED = [one for one in EXPERIMENTS if summary_of(one, STATES[one.name]) is not None]


@cache
def summary(name: str) -> Any:
    """The figures of a page, once for all tests."""
    return summary_of(next(one for one in EXPERIMENTS if one.name == name), STATES[name])


# Names that hold a digit and mean no quantity.
NAMES = re.compile(r"WikiText-2|q8_0|q4_1|f16|`[^`]*`")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?: %)?")


def values_in(data: Any) -> Iterator[float]:
    """Every number in JSON data."""
    if isinstance(data, dict):
        for item in data.values():
            yield from values_in(item)
    elif isinstance(data, list | tuple):
        for item in data:
            yield from values_in(item)
    elif isinstance(data, str):
        if re.fullmatch(r"\d+(\.\d+)?", data):
            yield float(data)
    elif isinstance(data, (int, float)) and not isinstance(data, bool):
        yield float(data)


def numbers_without_source(text: str, data: Any) -> list[str]:
    """Numbers in a sentence that no measured value rounds to."""
    known = list(values_in(data))
    lost = []
    for found in NUMBER.findall(NAMES.sub("", text)):
        share = found.endswith(" %")
        digits = found.removesuffix(" %").lstrip("-")
        decimals = len(digits.partition(".")[2])
        wanted = float(digits)
        if not any(abs(abs(value) * (100 if share else 1) - wanted) <= 0.5001 * 10**-decimals for value in known):
            lost.append(found)
    return lost


def typed_digits(template: str) -> list[str]:
    """Digits of a template's finding and decision that are outside of its expressions."""
    blocks = re.findall(r"{% block (finding|decision) %}(.*?){% endblock %}", template, re.DOTALL)
    assert "finding" in dict(blocks), "a page needs a finding"
    prose = re.sub(r"{%.*?%}|{{.*?}}", "", " ".join(text for _, text in blocks), flags=re.DOTALL)
    return re.findall(r"\d+", NAMES.sub("", prose))


def test_the_check_sees_a_wrong_number():
    assert numbers_without_source("20 % less and 1.5 times", {"share": 0.2, "times": 1.46}) == []
    assert numbers_without_source("21 % less", {"share": 0.2}) == ["21 %"]
    assert numbers_without_source("1.47 times", {"times": 1.46}) == ["1.47"]
    assert typed_digits("{% block finding %}{{ s.a | n(2) }} of 7 on WikiText-2{% endblock %}") == ["7"]
    assert typed_digits("{% block finding %}{% endblock %}{% block decision %}8{% endblock %}") == ["8"]


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda one: one.name)
def test_no_number_of_a_finding_is_typed(experiment):
    assert typed_digits((TEMPLATES / f"{experiment.name}.md.jinja").read_text()) == []


@pytest.mark.parametrize("experiment", MEASURED, ids=lambda one: one.name)
def test_the_page_says_what_was_measured(experiment):
    found = summary(experiment.name)
    finding, decision = (block(experiment, name, found) for name in ("finding", "decision"))
    assert NUMBER.findall(NAMES.sub("", finding)), "a finding without a figure"
    assert numbers_without_source(finding, found) == []
    assert numbers_without_source(decision, [found, product_defaults()]) == []
    page = (PAGES / f"{experiment.name}.md").read_text(encoding="utf-8")
    assert finding in page
    assert decision in page
    assert page.rstrip() == page_of(experiment, REQUEST, STATES[experiment.name], found).rstrip()
    assert all((PAGES / "figures" / f"{one.name}.svg").is_file() for one in experiment.figures(found))


def test_the_index_says_what_the_pages_say():
    told, decided = (
        {one.name: block(one, name, summary(one.name)) for one in MEASURED} for name in ("finding", "decision")
    )
    page = index_page(EXPERIMENTS, told, decided, quick=False)
    assert (PAGES / "index.md").read_text(encoding="utf-8").rstrip() == page.rstrip()


@pytest.mark.parametrize("experiment", [one for one in EXPERIMENTS if one not in MEASURED], ids=lambda one: one.name)
def test_what_is_not_measured_is_said(experiment):
    page = page_of(experiment, REQUEST, STATES[experiment.name], None)
    assert '!!! warning "Not measured yet"\n\n    Nothing has been' in page or "    Measured in part" in page
    assert (PAGES / f"{experiment.name}.md").read_text(encoding="utf-8").rstrip() == page.rstrip()


def test_a_page_says_how_much_is_there():
    state = State(found={"third": {}}, missing=("first", "second"))
    assert "1 of 3 steps" in page_of(EXPERIMENTS[0], REQUEST, state, None)


def test_the_time_of_a_page_is_that_of_its_own_cells():
    experiment = next(one for one in MEASURED if one.name == "group-sizes")
    (read,) = experiment.reads
    other = set(read.names(REQUEST))
    found = STATES[experiment.name].found
    timed = {name: {**record, "seconds": 6000.0 if name in other else 60.0} for name, record in found.items()}
    page = page_of(experiment, REQUEST, State(found=timed, missing=()), summary(experiment.name))
    assert other < set(found)
    assert f"together they took {len(set(found) - other)} minutes" in page


def test_every_experiment_has_its_place_in_the_site():
    site = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=yaml.BaseLoader)
    listed = next(part["Results"] for part in site["nav"] if "Results" in part)
    pages = [entry if isinstance(entry, str) else next(iter(entry.values())) for entry in listed]
    assert pages == ["results/index.md", *(f"results/{one.name}.md" for one in EXPERIMENTS)]


def test_no_result_and_no_chart_is_left_that_nothing_shows():
    files = {"dense"} | {one.name for one in EXPERIMENTS if not one.own_files}
    files |= {name for one in EXPERIMENTS if one.own_files for name in (*one.names(REQUEST), *one.extra)}
    assert {path.stem for path in RESULTS.glob("*.json")} <= files
    drawn = {chart.name for one in MEASURED for chart in one.figures(summary(one.name))}
    assert {path.stem for path in (PAGES / "figures").iterdir()} == drawn
