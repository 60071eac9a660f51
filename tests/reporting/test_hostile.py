"""`saap report` on folders from anybody: their text is inert, and what makes no sense is refused in one sentence."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from tests.command import run
from tests.reporting.comparison import comparison, recovery_record, task

from saap.core.errors import SaapError
from saap.reporting.report import build_page, write_page

EVIL = (
    "\"><img src=q onerror=alert(1)></script><script>alert(2)</script>$\\frac{${{7*7}}'&lt;!--]]>\n|[a](javascript:b)"
    "\x1b\x00\x0b"
)
MILD = "mild"
LAYERS, UNITS = 2, 240
STATISTICS = ("vector", "vector_m2", "element", "element_m2", "comoment")


def files(text: str) -> dict[str, Any]:
    """The records of a folder, a report of `saap eval` and a comparison, with `text` wherever they are free to say."""
    groups = {
        f"layers.{layer}.{role}": {"kept": units - 1, "of": units, "units": f"0-{units - 2}"}
        for layer in range(LAYERS)
        for role, units in (("ffn", UNITS), ("attention", 4))
    }
    plan = {"format_version": 1, "groups": groups, "trail": [{"name": text, "loss": 0.5}, {"name": "b", "loss": 0.6}]}
    change = {"before": 1000, "after": 800}
    manifest = {
        "base": {"source": text, "revision": text, "config_digest": text, "weights_digest": text, "licence": text},
        "command": ["prune", text], "settings": {text: text, "list": [text, {text: text}]}, "seed": 0,
        "layout": "adaptive", "device": text, "dtype": text, "versions": {text: text}, "digests": {},
        "stages": [{"name": text, "seconds": 1.0, "peak_resident_bytes": 10**9}],
        "parameters": change, "block_parameters": change, "bytes": change,
        "perplexity": {"text": text, "tokens": 100, "before": 20.0, "after": 25.0},
        "answers": {"prompt": text, "dense": text, "pruned": text, "recovered": text},
        "recovery": {**recovery_record(), "command": [text], "data": [text], "evaluation": text},
    }  # fmt: skip
    measured = {"perplexity": {text: {"value": 20.0}}, "tasks": {text: task([1, 0, 0, 1])}}
    written = {"greedy": {"distinct_1": 0.5, "tokens": 32.0}}
    speed = {"model": text, "prefill": 500.0, "decode": 24.0, "bytes_per_token": 800}
    evaluation = {
        "model": text, **measured, "dense": {"model": "other", **measured}, "command": ["eval", text],
        "generation": {
            "figures": written, "dense_figures": written, "token_agreement": 0.75,
            "cloze": {"accuracy": 0.25, "prompts": 8}, "dense_cloze": None,
            "samples": {"greedy": {text: {"pruned": text, "dense": text}}},
        },
        "speed": {
            "runtime": text, "weights": text, "threads": 2, "model": speed, "against": {**speed, "model": "other"},
        },
    }  # fmt: skip
    compared = comparison()
    dense = compared["dense"]
    dense["perplexity"], dense["tasks"] = {text: {"value": 20.0}}, {text: dense["tasks"]["arc_easy"]}
    for row in compared["rows"]:
        row["method"] = text if row["method"] == "saap" else row["method"]
        row["perplexity"] = {text: next(iter(row["perplexity"].values()))}
        row["ratios"] = {text: next(iter(row["ratios"].values()))}
        row["tasks"] = {text: row["tasks"]["arc_easy"]}
    compared |= {"model": text, "settings": {text: text}, "versions": {text: text}, "command": [text]}
    return {"plan": plan, "manifest": manifest, "eval": evaluation, "comparison": compared}


def written(at: Path, content: dict[str, Any]) -> Path:
    """A folder `model` with its records, `eval.json` and a folder `compared`."""
    (at / "model" / "saap").mkdir(parents=True, exist_ok=True)
    (at / "compared").mkdir(exist_ok=True)
    places = {
        "plan": "model/saap/plan.json", "manifest": "model/saap/manifest.json", "eval": "eval.json",
        "comparison": "compared/comparison.json",
    }  # fmt: skip
    for name, place in places.items():
        (at / place).write_text(json.dumps(content[name]))
    return at


def scores(**changes: Any) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and header of a file of scores."""
    generator = np.random.default_rng(0)
    names = [f"layers.{layer}.{role}" for layer in range(LAYERS) for role in ("ffn", "attention")]
    tensors = {
        f"{name}/{statistic}": generator.random(UNITS if name.endswith("ffn") else 4)
        for name in names
        for statistic in STATISTICS
    }
    header = {
        "graph_digest": "g", "calibration_digest": "c", "samples": "4", "element_order": "2", "aggregation": "sum",
        "groups": json.dumps(names),
    }  # fmt: skip
    header |= {key: value for key, value in changes.items() if isinstance(value, str)}
    tensors |= {key.replace("__", "/"): value for key, value in changes.items() if not isinstance(value, str)}
    return {"losses": np.ones(4), **tensors}, header


def with_scores(at: Path, **changes: Any) -> Path:
    save_file(*scores(**changes)[:1], at / "model" / "saap" / "scores.safetensors", metadata=scores(**changes)[1])
    return at


class Skeleton(HTMLParser):
    """The names of a page's elements and of their attributes, without any text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def report(capsys: pytest.CaptureFixture[str], at: Path, *flags: object) -> tuple[int, str, Path]:
    out = at / "page.html"
    code, _, error = run(capsys, "report", at / "model", "--out", out, *flags)
    return code, error, out


def everything(at: Path) -> list[object]:
    return ["--eval", at / "eval.json", "--compare", at / "compared", "--figures", at / "figures"]


def test_text_of_a_folder_makes_no_element_and_no_attribute(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    pages = {}
    for name, text in (("mild", MILD), ("evil", EVIL)):
        at = with_scores(written(tmp_path / name, files(text)))
        code, error, out = report(capsys, at, *everything(at))
        assert code == 0, error
        assert not [letter for letter in error if not letter.isprintable() and letter != "\n"]
        pages[name] = Skeleton(out.read_text())
        code, _, _ = run(capsys, "report", at / "compared", "--out", at / "compared.html", "--eval", at / "eval.json")
        assert code == 0
        pages[f"{name}, compared"] = Skeleton((at / "compared.html").read_text())
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    for name in ("evil", "evil, compared"):
        found, honest = pages[name], pages[name.replace("evil", "mild")]
        assert found.tags <= honest.tags
        assert found.attributes <= honest.attributes
        assert not {"script", "img", "foreignobject", "iframe"} & found.tags
    inside = tmp_path / "evil" / "figures"
    assert {path.parent for path in tmp_path.rglob("*.svg")} == {inside, tmp_path / "mild" / "figures"}
    for file in inside.glob("*.svg"):
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(file.read_text()).iter()}
        assert not tags & {"script", "img", "foreignObject"}
    assert not [file for file in inside.glob("*.md") if "<img" in file.read_text() or "\n|[a]" in file.read_text()]
    assert not [file for file in inside.glob("*.tex") if "$\\frac" in file.read_text()]


@pytest.mark.parametrize("name", ["layers.0.x" + EVIL, "layers.0." + EVIL, EVIL, "layers.99999999999999999999.ffn", ""])
def test_a_group_that_no_run_has_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    content = files(MILD)
    content["plan"]["groups"][name] = {"kept": 1, "of": 2, "units": "0"}
    refused(capsys, written(tmp_path, content), "plan.json")


def refused(capsys: pytest.CaptureFixture[str], at: Path, offender: str) -> None:
    code, error, out = report(capsys, at, *everything(at))
    assert code == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert offender in error
    assert not out.exists()


HUGE = 10**400
WRONG: list[tuple[str, tuple[Any, ...], Any]] = [
    ("plan", (), []), ("plan", ("groups",), []), ("plan", ("groups",), None), ("plan", ("groups", "layers.0.ffn"), 3),
    ("plan", ("groups", "layers.0.ffn", "kept"), "many"), ("plan", ("groups", "layers.0.ffn", "kept"), None),
    ("plan", ("groups", "layers.0.ffn", "kept"), 241), ("plan", ("groups", "layers.0.ffn", "of"), HUGE),
    ("plan", ("groups", "layers.0.ffn", "of"), -1), ("plan", ("dropped_blocks",), "all"), ("plan", ("trail",), {}),
    ("plan", ("trail", 0), "first"), ("plan", ("trail", 0, "loss"), float("nan")),
    ("plan", ("trail", 0, "loss"), float("inf")), ("plan", ("trail", 0, "loss"), 1e300),
    ("plan", ("trail", 0, "name"), ["a"]), ("plan", ("format_version",), 9),
    ("manifest", (), "x"), ("manifest", ("base",), None), ("manifest", ("parameters", "before"), HUGE),
    ("manifest", ("parameters", "before"), float("nan")), ("manifest", ("parameters", "before"), -5),
    ("manifest", ("perplexity", "before"), 0), ("manifest", ("perplexity", "before"), "low"),
    ("manifest", ("stages",), {"a": 1}), ("manifest", ("stages", 0, "seconds"), float("inf")),
    ("manifest", ("stages", 0, "seconds"), -1), ("manifest", ("stages", 0, "peak_resident_bytes"), HUGE),
    ("manifest", ("versions",), ["a"]), ("manifest", ("answers",), "yes"), ("manifest", ("command",), "prune"),
    ("manifest", ("recovery", "curve", 0, "loss"), float("nan")), ("manifest", ("recovery", "curve"), [1]),
    ("manifest", ("layout",), "both"), ("manifest", ("settings",), []),
    ("eval", (), []), ("eval", ("model",), None), ("eval", ("perplexity",), []),
    ("eval", ("perplexity", MILD), 3.0), ("eval", ("perplexity", MILD, "value"), "low"),
    ("eval", ("tasks", MILD, "acc"), None), ("eval", ("tasks", MILD, "acc_stderr"), -0.1),
    ("eval", ("tasks", MILD, "chance"), float("nan")), ("eval", ("dense",), "it"), ("eval", ("command",), [1]),
    ("eval", ("generation", "figures"), 3), ("eval", ("generation", "figures", "greedy", "tokens"), "few"),
    ("eval", ("generation", "samples", "greedy"), ["a"]), ("eval", ("generation", "cloze"), {"accuracy": 2}),
    ("eval", ("speed", "model", "prefill"), 0), ("eval", ("speed", "against", "decode"), float("nan")),
    ("eval", ("speed",), [1]),
    ("comparison", (), {}), ("comparison", ("rows",), []), ("comparison", ("rows", 0), None),
    ("comparison", ("rows", 0, "ratio"), "half"), ("comparison", ("rows", 0, "ratio"), HUGE),
    ("comparison", ("rows", 0, "method"), 3.5), ("comparison", ("rows", 3, "ratios"), {}),
    ("comparison", ("rows", 3, "tasks"), {"other": task([1])}), ("comparison", ("rows", 3, "ratios", MILD), -2.0),
    ("comparison", ("rows", 3, "seconds"), {}), ("comparison", ("rows", 3, "seconds", "make"), float("inf")),
    ("comparison", ("rows", 3, "peak_resident_bytes"), None), ("comparison", ("rows", 3, "kept_accuracy"), 1),
    ("comparison", ("dense", "perplexity"), {}), ("comparison", ("dense", "parameters"), HUGE),
    ("comparison", ("dense", "tokens_per_second"), 0), ("comparison", ("versions",), None),
    ("comparison", ("settings",), [1]),
]  # fmt: skip


@pytest.mark.parametrize(("file", "place", "value"), WRONG, ids=lambda part: str(part)[:40])
def test_what_makes_no_sense_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, place: tuple[Any, ...], value: Any
) -> None:
    content = files(MILD)
    put(content, (file, *place), value)
    refused(capsys, written(tmp_path, content), f"{file}.json")


def put(tree: Any, place: tuple[Any, ...], value: Any) -> None:
    for key in place[:-1]:
        tree = tree[key]
    tree[place[-1]] = value


def test_a_refusal_is_one_line_whatever_the_entries_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = files(EVIL)
    content["eval"]["tasks"][EVIL]["acc"] = None
    refused(capsys, written(tmp_path, content), "eval.json")


MANY = np.ones(UNITS)
SCORES: list[dict[str, Any]] = [
    {"layers.0.ffn__vector": np.ones(3)}, {"layers.0.ffn__vector": np.ones((UNITS, 1))},
    {"layers.0.ffn__vector": np.array(1.0)}, {"layers.0.ffn__vector": MANY * float("nan")},
    {"layers.0.ffn__element_m2": MANY * float("inf")}, {"layers.0.ffn__comoment": MANY * 1e300},
    {f"layers.0.ffn__{name}": np.ones(7) for name in STATISTICS},
    {"groups": '["none"]'}, {"groups": "{"}, {"groups": "3"}, {"groups": "[" * 100_000}, {"samples": "few"},
    {"samples": "1" * 400}, {"samples": "-1"},
]  # fmt: skip


@pytest.mark.parametrize("changes", SCORES, ids=lambda changes: str(changes)[:40])
def test_scores_that_do_not_fit_are_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    refused(capsys, with_scores(written(tmp_path, files(MILD)), **changes), "scores.safetensors")


@pytest.mark.parametrize("units", ["0-99999999999", "9,3", "x", "0-240"])
def test_units_that_the_scores_do_not_have(tmp_path: Path, capsys: pytest.CaptureFixture[str], units: str) -> None:
    content = files(MILD)
    content["plan"]["groups"]["layers.0.ffn"]["units"] = units
    refused(capsys, with_scores(written(tmp_path, content)), "scores.safetensors")


@pytest.mark.parametrize("scope", ["block", 3, ["role"]])
def test_a_fusion_scope_that_nobody_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str], scope: Any) -> None:
    content = files(MILD)
    content["manifest"]["settings"]["fusion_scope"] = scope
    refused(capsys, with_scores(written(tmp_path, content)), "scores.safetensors")


def test_layers_of_different_widths_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = files(MILD)
    content["plan"]["groups"]["layers.1.ffn"] = {"kept": 300, "of": 300, "units": "0-299"}
    wider = {f"layers.1.ffn__{name}": np.ones(300) for name in STATISTICS}
    at = with_scores(written(tmp_path, content), **wider)
    code, error, out = report(capsys, at)
    assert (code, "by-layer-ffn" in out.read_text()) == (0, True), error


def test_the_experts_of_a_layer_are_shown_together(tmp_path: Path) -> None:
    content, names = files(MILD), [f"layers.{layer}.ffn.expert.{expert}" for layer in (0, 1) for expert in (0, 1, 2)]
    content["plan"]["groups"] = {
        name: {"kept": 90 - 10 * expert, "of": 100, "units": f"0-{89 - 10 * expert}"}
        for expert, name in enumerate(names[:3])
    } | {name: {"kept": 100, "of": 100, "units": "0-99"} for name in names[3:]}
    generator = np.random.default_rng(0)
    found = {f"{name}__{one}": generator.random(100) for name in names for one in STATISTICS}
    folder = with_scores(written(tmp_path, content), groups=json.dumps(names), **found) / "model"
    structure, importance = (one for one in build_page(folder).sections if one.name in ("structure", "importance"))
    assert structure.tables[0][1] == (["layer", "ffn"], [["0", "240 of 300"], ["1", "300 of 300"]])
    assert [rows[0][:2] for _, (_, rows) in importance.tables] == [["ffn", "600"], ["0", "240 of 300"]]


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


PLACES = [place for place in places(files(MILD)) if place]
ODD = st.sampled_from([None, True, -1, 0, 1.5, 10**20, HUGE, 1e308, float("nan"), "", EVIL, [], {}, [1], {"a": None}])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), value=ODD)
def test_any_value_anywhere_is_shown_or_refused(tmp_path: Path, place: tuple[Any, ...], value: Any) -> None:
    content = files(MILD)
    put(content, place, value)
    at = written(tmp_path, content)
    with suppress(SaapError):
        page = build_page(at / "model", [at / "eval.json"], at / "compared")
        write_page(page, at / "page.html", None)
        assert not {"script", "img"} & Skeleton((at / "page.html").read_text()).tags
