"""The sections that a page about a model and one about a comparison share."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from saap.reporting import model_figures
from saap.reporting.page import Section
from saap.reporting.tables import names_apart, number, short

MODES = ("greedy", "sampled")
MEASURES = (
    ("distinct_1", "distinct words, %", 100), ("distinct_2", "distinct pairs, %", 100),
    ("distinct_3", "distinct triples, %", 100), ("repetition", "repeated, %", 100), ("tokens", "tokens", 1),
    ("dense_perplexity", "perplexity under the dense model", 1),
)  # fmt: skip


def evaluation_sections(reports: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Perplexities, tasks, text and speed of `saap eval`, the dense model beside them where it was measured."""
    parts = [part for report in reports for part in (report.get("dense"), report) if part is not None]
    columns: dict[str, dict[str, Any]] = {}
    for label, part in zip(_labels(parts), parts, strict=True):
        known = columns.setdefault(label, {"perplexity": {}, "tasks": {}})
        known["perplexity"] |= part["perplexity"]
        known["tasks"] |= part["tasks"]
    found = [
        _perplexity_section(columns),
        _task_section(columns),
        *[_writing_section(report["generation"]) for report in reports if report.get("generation")],
        *[_speed_section(report["speed"]) for report in reports if report.get("speed")],
    ]
    return [section for section in found if section is not None]


def _labels(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to call each model: the last part of its name where no other ends alike, and what tells revisions apart."""
    models = [(one["model"], one.get("revision")) for one in measured]
    alike = len({short(name) for name, _ in models}) < len({name for name, _ in models})
    return names_apart(models if alike else [(short(name), revision) for name, revision in models])


def _perplexity_section(columns: Mapping[str, dict[str, Any]]) -> Section | None:
    texts = list(dict.fromkeys(text for part in columns.values() for text in part["perplexity"]))
    if not texts:
        return None
    rows = [
        [name, *(number((part["perplexity"].get(text) or {}).get("value"), 2) for text in texts)]
        for name, part in columns.items()
    ]
    table = ["model", *map(short, texts)], rows
    return Section(name="perplexity", title="Perplexity", tables=(("Lower is better", table),))


def _task_section(columns: Mapping[str, dict[str, Any]]) -> Section | None:
    tested = {name: part["tasks"] for name, part in columns.items() if part["tasks"]}
    if not tested:
        return None
    names = list(next(iter(tested.values())))
    common = {model: tasks for model, tasks in tested.items() if list(tasks) == names}
    rows = [
        [name, *(f"{tasks[name]['acc']:.3f} ± {tasks[name]['acc_stderr']:.3f}" for tasks in common.values())]
        for name in names
    ]
    return Section(
        name="tasks",
        title="Questions answered without examples",
        figures=(model_figures.accuracy(common),),
        tables=(("Accuracy and standard error", (["task", *common], rows)),),
    )


def _writing_section(generation: Mapping[str, Any]) -> Section | None:
    """What the models wrote, measured and side by side."""
    rows = []
    for mode in MODES:
        for name, figures in (("dense", generation.get("dense_figures")), ("pruned", generation.get("figures"))):
            if figures and mode in figures:
                cells = [figures[mode].get(key) for key, _, _ in MEASURES]
                shown = [
                    number(None if cell is None else cell * factor, 1)
                    for cell, (_, _, factor) in zip(cells, MEASURES, strict=True)
                ]
                rows.append([f"{name}, {mode}", *shown])
    words = []
    if generation.get("token_agreement") is not None:
        words.append(
            f"Reading what the dense model wrote, the pruned one would have gone on with the same token in "
            f"{generation['token_agreement']:.0%} of the places."
        )
    facts = [(name, generation.get(key)) for name, key in (("dense", "dense_cloze"), ("pruned", "cloze"))]
    known = [f"the {name} model {one['accuracy']:.0%}" for name, one in facts if one]
    if known:
        words.append(f"Of the facts that were asked ({_prompts(facts)}), {' and '.join(known)} were completed rightly.")
    answers = tuple(
        (prompt, tuple((name, texts[name]) for name in ("dense", "pruned") if name in texts))
        for prompt, texts in generation.get("samples", {}).get("greedy", {}).items()
    )
    if not rows and not answers:
        return None
    table = ["model, mode", *(label for _, label, _ in MEASURES)], rows
    tables = (("What was written: variety, repetition, and how likely the dense model finds it", table),)
    return Section(
        name="answers",
        title="Answers side by side",
        paragraphs=tuple(words),
        tables=tables if rows else (),
        answers=answers,
    )


def _prompts(facts: Sequence[tuple[str, Mapping[str, Any] | None]]) -> str:
    return next(f"{one['prompts']} sentences to complete" for _, one in facts if one)


def _speed_section(speed: Mapping[str, Any]) -> Section:
    """speed: the data of a SpeedReport; the model that it was measured beside comes first."""
    measured = [one for one in (speed["against"], speed["model"]) if one is not None]
    names = _labels(measured)
    found = {
        label: {name: float(one[key]) for name, one in zip(names, measured, strict=True)}
        for key, label in (("prefill", "reading"), ("decode", "writing"))
    }
    rows = [
        [name, number(one["prefill"], 1), number(one["decode"], 1), f"{one['bytes_per_token']:,}"]
        for name, one in zip(names, measured, strict=True)
    ]
    weights, threads = speed["weights"], speed["threads"]
    title = f"Tokens per second in {speed['runtime']}, one sequence, weights {weights}, {threads} threads"
    table = ["model", "reading", "writing", "bytes read per written token"], rows
    return Section(name="speed", title="Speed", figures=(model_figures.speeds(found),), tables=((title, table),))


def environment_section(
    commands: Sequence[Sequence[str]], versions: Mapping[str, str], settings: Mapping[str, Any]
) -> Section:
    """Commands, settings and versions. commands: arguments of `saap`."""
    chosen = [[name, _plain(value)] for name, value in settings.items() if value is not None]
    return Section(
        name="environment",
        title="How to do it again",
        code="\n".join(f"saap {shlex.join(command)}" for command in commands if command),
        tables=(
            ("Settings", (["setting", "value"], chosen)),
            ("Versions", (["package", "version"], [[name, value] for name, value in versions.items()])),
        ),
    )


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return json.dumps(value)
