"""What the pages say is what was measured: no number is typed by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from resultsbook.driver import State, state_of
from resultsbook.pages import (
    TEMPLATES,
    decision,
    finding,
    index_page,
    product_defaults,
    row_page,
    summary_of,
    unfinished_page,
)
from resultsbook.registry import ROWS
from resultsbook.row import Request

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
REQUEST = Request(quick=False, work=ROOT / "out" / "book")
STATES = {row.name: state_of(row, REQUEST, RESULTS) for row in ROWS}
MEASURED = [row for row in ROWS if STATES[row.name].complete]
# Names that hold a digit and mean no quantity.
NAMES = re.compile(r"WikiText-2|q8_0|q4_1|f16|`[^`]*`")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?: %)?")


def values_in(data: Any) -> Iterator[float]:
    """Every number in JSON data."""
    if isinstance(data, dict):
        for item in data.values():
            yield from values_in(item)
    elif isinstance(data, list):
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


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_no_number_of_a_finding_is_typed(row):
    assert typed_digits((TEMPLATES / f"{row.name}.md.jinja").read_text()) == []


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row.name)
def test_the_numbers_in_the_prose_are_those_of_the_json(row):
    page = (RESULTS / f"{row.name}.md").read_text(encoding="utf-8")
    said = re.search(r'!!! abstract "Finding"\n\n    (.*)\n', page)
    data = json.loads((RESULTS / f"{row.name}.json").read_text())
    assert said
    assert NUMBER.findall(NAMES.sub("", said[1])), "a finding without a figure"
    assert numbers_without_source(said[1], data["summary"]) == []
    decided = decision(row, data["summary"])
    assert decided in page
    assert numbers_without_source(decided, [data["summary"], product_defaults()]) == []


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row.name)
def test_the_committed_page_is_what_the_measured_values_give(row):
    state = STATES[row.name]
    summary = json.loads(json.dumps(summary_of(row, state)))
    kept = json.loads((RESULTS / f"{row.name}.json").read_text())["summary"]
    assert list(values_in(kept)) == pytest.approx(list(values_in(summary)), rel=1e-9)
    figures = row.figures(summary)
    assert (RESULTS / f"{row.name}.md").read_text(encoding="utf-8").rstrip() == row_page(
        row, REQUEST, state, summary, figures
    ).rstrip()
    assert all((RESULTS / "figures" / f"{figure.name}.svg").is_file() for figure in figures)


def test_the_index_says_what_the_pages_say():
    told, decided = {}, {}
    for row in MEASURED:
        summary = summary_of(row, STATES[row.name])
        told[row.name], decided[row.name] = finding(row, summary), decision(row, summary)
    page = index_page(ROWS, told, decided, REQUEST)
    assert (RESULTS / "index.md").read_text(encoding="utf-8").rstrip() == page.rstrip()


@pytest.mark.parametrize("row", [row for row in ROWS if row not in MEASURED], ids=lambda row: row.name)
def test_what_is_not_measured_is_said(row):
    page = unfinished_page(row, STATES[row.name])
    assert '!!! warning "Not measured yet"\n\n    Nothing has been' in page or "    Measured in part" in page
    assert (RESULTS / f"{row.name}.md").read_text(encoding="utf-8").rstrip() == page.rstrip()


def test_a_page_says_how_much_is_there():
    first, second, third, *_ = ROWS[0].sources
    assert "1 of 3 steps" in unfinished_page(ROWS[0], State(found={third: {}}, missing=(first, second)))


def test_every_row_has_its_place_in_the_site():
    site = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=yaml.BaseLoader)
    listed = next(part["Results"] for part in site["nav"] if "Results" in part)
    pages = [entry if isinstance(entry, str) else next(iter(entry.values())) for entry in listed]
    assert pages == ["results/index.md", *(f"results/{row.name}.md" for row in ROWS)]
