from __future__ import annotations

import dataclasses
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from tests import browser
from tests.command import run
from tests.pipeline import tiny
from tests.reporting.comparison import comparison, recovery_record, task

import saap
from saap.core.errors import EvaluationError, ModelError
from saap.reporting.importance import PlanGroup
from saap.reporting.model_page import _structure_section
from saap.reporting.page import Page, Section, render
from saap.reporting.report import build_page, write_page

needs_browser = pytest.mark.skipif(not browser.CHROMIUM, reason="no Chromium is installed")
LARGEST = 3_000_000


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    source = tiny.folder(tmp_path_factory.mktemp("dense"), layers=6)
    out = tmp_path_factory.mktemp("pruned") / "small"
    saap.prune(
        source, pruning_ratio=0.2, out=out, effort="fast", samples=4, sample_length=32, refit_tokens=1024, align=8,
        calibration="novels", importance="fused",
    )  # fmt: skip
    manifest = out / "saap" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["settings"]["calibration"] = ["<script>alert(1)</script>"]
    manifest.write_text(json.dumps(content))
    return out


@pytest.fixture
def evaluation(tmp_path) -> Path:
    part = {"model": "dense", "perplexity": {"text": {"value": 20.0}}, "tasks": {"arc_easy": task([1, 1, 0, 1])}}
    written = {"distinct_1": 0.5, "distinct_2": 0.8, "distinct_3": 0.9, "repetition": 0.1, "tokens": 32.0}
    report = {
        "model": "small", "perplexity": {"text": {"value": 25.0}}, "tasks": {"arc_easy": task([1, 0, 0, 1])},
        "dense": part, "command": ["eval", "small", "--tasks", "arc_easy"],
        "generation": {
            "figures": {"greedy": written}, "dense_figures": {"greedy": written}, "token_agreement": 0.75,
            "cloze": {"accuracy": 0.25, "prompts": 8}, "dense_cloze": {"accuracy": 0.5, "prompts": 8},
            "samples": {"greedy": {"Why <b>?": {"pruned": "Because & so.", "dense": "Well."}}},
        },
        "chat": {"value": 7.25, "nll": 1.98, "tokens": 90, "turns": 4},
        "speed": {
            "runtime": "transformers", "weights": "float32", "threads": 2,
            "model": {"model": "small", "prefill": 500.0, "decode": 24.0, "bytes_per_token": 800},
            "against": {"model": "tiny", "prefill": 400.0, "decode": 20.0, "bytes_per_token": 1000},
        },
    }  # fmt: skip
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(report))
    return path


def comparison_folder(at: Path) -> Path:
    (at / "comparison.json").write_text(json.dumps(comparison()))
    return at


FOR_READERS = """(page) => ({
  h1: page.querySelectorAll("h1").length,
  skip: page.querySelector(page.querySelector("a.skip").getAttribute("href")) !== null,
  dead: [...page.querySelectorAll("nav a")].filter((link) => !page.querySelector(link.getAttribute("href"))).length,
  bare: [...page.querySelectorAll("table")].filter((table) => !table.caption.textContent).length,
  heads: [...page.querySelectorAll("tbody tr")].filter((row) => row.cells[0].scope !== "row").length,
  stuck: [...page.querySelectorAll(".scroll")].filter((box) => box.tabIndex !== 0 || !box.ariaLabel).length,
  twice: [...page.querySelectorAll("[id]")].map((one) => one.id).filter((id, at, all) => all.indexOf(id) !== at).length,
})"""


def check_in_browser(page: Path, folder: Path, charts: int) -> None:
    for width in (360, 1200):
        seen = browser.look(page, width, folder, FOR_READERS)
        assert seen["extra"] == {"h1": 1, "skip": True, "dead": 0, "bare": 0, "heads": 0, "stuck": 0, "twice": 0}
        assert seen["overflow"] <= 0, width
        assert seen["console"] == []
        assert len(seen["charts"]) == charts
        assert all(height > 50 for height in seen["charts"])
        assert (seen["unlabelled"], seen["resources"]) == (0, 0)


def test_a_model_page(model_folder, evaluation, tmp_path) -> None:
    page, out = model_page(model_folder, evaluation, tmp_path)
    assert [section.name for section in page.sections] == [
        "kinds", "structure", "importance", "search", "ratios", "perplexity", "tasks", "answers", "conversations",
        "speed", "answer", "stages", "environment",
    ]  # fmt: skip
    names = [figure.name for figure in page.figures]
    assert len(set(names)) == len(names)
    assert {"by-layer-ffn", "distribution-ffn", "agreement-ffn", "changed-ffn", "fluctuation-ffn"} <= set(names)
    content = out.read_text()
    assert len(content.encode()) < LARGEST
    assert "<script>alert" not in content
    assert "Because &amp; so." in content
    assert "saap eval small --tasks arc_easy" in content
    assert "7.25" in content
    assert "the dense model 50% and the pruned model 25%" in content
    assert "||" not in content


def test_channels_of_the_whole_model_are_not_forgotten() -> None:
    groups = [PlanGroup(-1, "hidden", 48, 64, None), PlanGroup(0, "ffn", 80, 80, None)]
    said = " ".join(_structure_section(groups, ()).paragraphs)
    assert "In all layers 48 of 64 hidden units are kept." in said


def model_page(folder: Path, evaluation: Path, at: Path) -> tuple[Page, Path]:
    page = build_page(folder, [evaluation], comparison_folder(at))
    write_page(page, at / "page.html", None)
    return page, at / "page.html"


def test_the_page_of_a_tuned_folder_has_the_figures_after_the_tuning(model_folder, tmp_path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "tuned")
    file = folder / "saap" / "manifest.json"
    content = json.loads(file.read_text())
    record = recovery_record() | {
        "perplexity": {"dense": 20.0, "before": 70.0, "recovered": 37.0},
        "command": ["recover", "small/", "-o", "tuned/"],
        "stages": [{"name": "train", "seconds": 5000.0, "peak_resident_bytes": 10**9}],
    }  # fmt: skip
    file.write_text(json.dumps(content | {"recovery": record}))
    page = build_page(folder, [])
    assert dict(map(reversed, page.tiles))["the dense model's perplexity"] == "1.85 x"
    assert "from 20.0 to 37.0" in page.summary
    assert "Then it was tuned" in page.summary
    sections = {section.name: section for section in page.sections}
    assert sections["kinds"].title.endswith(", before the recovery")
    assert "train" in {row[0] for _, (_, rows) in sections["stages"].tables for row in rows}
    assert "saap recover small/ -o tuned/" in sections["environment"].code
    unpruned = dict.fromkeys(("before", "after"), content["parameters"]["before"])
    file.write_text(json.dumps(content | {"recovery": record, "parameters": unpruned}))
    (folder / "saap" / "plan.json").unlink()
    page = build_page(folder, [])
    assert "tuned by saap" in page.title
    assert " was tuned." in page.summary


def test_measurements_of_one_model_in_other_windows_have_rows_of_their_own(model_folder, tmp_path) -> None:
    files = []
    for value in (10.0, 9.0, 9.0):
        files.append(tmp_path / f"{len(files)}.json")
        files[-1].write_text(json.dumps({"model": "small/", "perplexity": {"text": {"value": value}}, "tasks": {}}))
    page = build_page(model_folder, files)
    table = next(section for section in page.sections if section.name == "perplexity").tables[0][1][1]
    assert table == [["small", "10.00"], ["small-2", "9.00"]]


@needs_browser
def test_a_model_page_in_a_browser(model_folder, evaluation, tmp_path) -> None:
    page, out = model_page(model_folder, evaluation, tmp_path)
    check_in_browser(out, tmp_path, len(page.figures))


def test_a_comparison_page(tmp_path) -> None:
    page = build_page(comparison_folder(tmp_path))
    assert "3 methods" in page.summary
    assert "saap stays nearest with 1.45 times its perplexity" in page.summary
    names = [figure.name for figure in page.figures]
    assert names == ["ratio-cut-text-txt", "ratio-restored-text-txt", "gain-text-txt", "kept-0-1", "kept-0-2",
                     "speed-by-ratio", "cost"]  # fmt: skip


def test_ratios_are_written_with_their_digits(tmp_path) -> None:
    content = json.dumps(comparison()).replace('"ratio": 0.2', '"ratio": 0.125')
    (tmp_path / "comparison.json").write_text(content)
    page = build_page(tmp_path)
    assert [tile for tile, label in page.tiles if label == "of the blocks removed"] == ["10%, 12.5%"]
    write_page(page, tmp_path / "page.html", tmp_path / "figures")
    shown = (tmp_path / "page.html").read_text()
    assert ("12.5% removed" in shown, "12%" in shown) == (True, False)
    for name in ("ratio-cut-text-txt", "speed-by-ratio"):
        assert ">12.5%<" in (tmp_path / "figures" / f"{name}.svg").read_text()


def test_a_comparison_with_a_speed_measurement_has_no_two_figures_of_one_name(evaluation, tmp_path) -> None:
    page = build_page(comparison_folder(tmp_path), [evaluation])
    names = [figure.name for figure in page.figures]
    assert {"speed", "speed-by-ratio"} < set(names)
    assert len(set(names)) == len(names)


@needs_browser
def test_a_comparison_page_in_a_browser(tmp_path) -> None:
    page = build_page(comparison_folder(tmp_path))
    write_page(page, tmp_path / "page.html", None)
    check_in_browser(tmp_path / "page.html", tmp_path, len(page.figures))


def test_the_best_of_a_column_is_marked_and_long_tables_are_folded(tmp_path) -> None:
    page = build_page(comparison_folder(tmp_path))
    content = render(page)
    # at 10 % and 20 %, cut only and restored: four columns with a best method each
    assert content.count('class="best"') == 4
    assert 'class="best">1.250 ± 0.071<' in content
    assert "<summary>Settings" not in content
    rows = [[str(number)] for number in range(20)]
    long = Section(name="long", title="Long", tables=(("Many", (["number"], rows)),))
    assert "<details><summary>Many <small>(20 rows)" in render(dataclasses.replace(page, sections=(long,)))


def test_figures_become_files(tmp_path) -> None:
    page = build_page(comparison_folder(tmp_path))
    written = write_page(page, tmp_path / "page.html", tmp_path / "figures")
    svgs = [path for path in written if path.suffix == ".svg"]
    assert len(svgs) == len([path for path in written if path.suffix == ".png"]) == len(page.figures)
    tables = [path for path in written if path.suffix in (".md", ".tex")]
    assert len(tables) == 2 * sum(len(section.tables) for section in page.sections)
    assert any(path.read_text().startswith("| method | 10% | 20% |") for path in tables)
    for svg in svgs:
        assert ElementTree.fromstring(svg.read_text()).tag.endswith("svg")
    assert (tmp_path / "figures" / f"{page.figures[0].name}.png").read_bytes().startswith(b"\x89PNG")


def test_what_has_the_same_name_gets_a_number(evaluation, tmp_path) -> None:
    """Texts of one file name in two folders, and two reports of `saap eval`."""
    content = comparison()
    for part in (content["dense"], *content["rows"]):
        part["perplexity"]["c/text.txt"] = part["perplexity"]["a/b/text.txt"]
    for one in content["rows"]:
        one["ratios"]["c/text.txt"] = 7.5
    (tmp_path / "comparison.json").write_text(json.dumps(content))
    page = build_page(tmp_path, [evaluation, evaluation])
    written = write_page(page, tmp_path / "page.html", tmp_path / "figures")
    assert len(set(written)) == len(written)
    names = {path.name for path in written}
    assert {"ratio-cut-text-txt.svg", "ratio-cut-text-txt-2.svg", "gain-text-txt-2.svg", "speed-2.png"} < names
    shown = re.findall(r'\sid="([^"]+)"', (tmp_path / "page.html").read_text())
    assert len(set(shown)) == len(shown)
    perplexities = [path.read_text() for path in written if "perplexity-dense-cut-only" in path.name]
    assert sum("7.500" in text for text in perplexities) == 2  # as Markdown and as LaTeX


def test_the_recovery_of_a_model_is_shown(model_folder, tmp_path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "recovered"))
    file = folder / "saap" / "manifest.json"
    answers = {"prompt": "Why?", "dense": "A", "pruned": "B", "recovered": "C"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "recovery": recovery_record(), "answers": answers}))
    sections = {section.name: section for section in build_page(folder).sections}
    recovery, answer = sections["recovery"], sections["answer"]
    assert "training from 3.00 to 2.50" in recovery.figures[0].text
    assert answer.answers[0] == ("Why?", (("dense", "A"), ("pruned", "B"), ("recovered", "C")))


def test_the_command(tmp_path, capsys) -> None:
    code, _, _ = run(capsys, "report", comparison_folder(tmp_path), "--out", tmp_path / "r.html")
    assert (code, (tmp_path / "r.html").exists()) == (0, True)
    code, _, error = run(capsys, "report", tmp_path / "nowhere")
    assert (code, "nowhere" in error) == (2, True)


def test_other_files_are_refused(tmp_path) -> None:
    comparison_folder(tmp_path)
    with pytest.raises(EvaluationError, match="is a comparison itself"):
        build_page(tmp_path, [], tmp_path)
    with pytest.raises(EvaluationError, match="nowhere"):
        build_page(tmp_path, [], tmp_path / "nowhere")
    (tmp_path / "e.json").write_text("[]")
    with pytest.raises(EvaluationError, match="is not a report of"):
        build_page(tmp_path, [tmp_path / "e.json"])
    (tmp_path / "e.json").write_text("{}")
    with pytest.raises(EvaluationError, match="is not a report of"):
        build_page(tmp_path, [tmp_path / "e.json"])


def test_a_damaged_manifest_is_refused(tmp_path) -> None:
    (tmp_path / "saap").mkdir()
    (tmp_path / "saap" / "manifest.json").write_text('{"seed": 1}')
    with pytest.raises(ModelError, match="not a manifest of this version"):
        build_page(tmp_path)


def test_a_task_that_one_model_was_not_asked_has_an_empty_cell(model_folder, tmp_path) -> None:
    parts = ({"arc_easy": task([1, 0, 0, 1])}, {"arc_easy": task([1, 1, 0, 1]), "piqa": task([1, 1, 1, 1])})
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, tasks in zip(paths, parts, strict=True):
        path.write_text(json.dumps({"model": path.stem, "tasks": tasks}))
    (section,) = [one for one in build_page(model_folder, paths, None).sections if one.name == "tasks"]
    ((_, (headings, rows)),) = section.tables
    assert headings == ["task", "first", "second"]
    assert [(row[0], bool(row[1]), bool(row[2])) for row in rows] == [("arc_easy", True, True), ("piqa", False, True)]
