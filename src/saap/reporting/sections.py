"""Sections shared by the pages about models and comparisons."""

from __future__ import annotations

import json
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from saap.core.evaluation_records import (
    Comparison,
    EvalReport,
    GenerationReport,
    ModelSpeed,
    Perplexity,
    SpeedReport,
    TaskResult,
)
from saap.core.manifest import RunManifest
from saap.reporting import model_figures
from saap.reporting.figures import words
from saap.reporting.page import Section
from saap.reporting.tables import MEASURES, accuracy, names_apart, number, short


def evaluation_sections(reports: Sequence[EvalReport]) -> list[Section]:
    """Perplexities, tasks, text and speed of `saap eval`, with the dense model if it was measured."""
    parts = [part for report in reports for part in (report.dense, report) if part is not None]
    perplexity: defaultdict[str, dict[str, Perplexity]] = defaultdict(dict)
    tasks: defaultdict[str, dict[str, TaskResult]] = defaultdict(dict)
    for name, part in zip(_labels(parts), parts, strict=True):
        label, count = name, 1
        while _differs(perplexity[label], part.perplexity) or _differs(tasks[label], part.tasks):
            label, count = f"{name}-{count + 1}", count + 1
        perplexity[label] |= part.perplexity
        tasks[label] |= part.tasks
    tested = {model: found for model, found in tasks.items() if found}
    generations = [report.generation for report in reports if report.generation is not None]
    return [
        *([_perplexity_section(perplexity)] if any(perplexity.values()) else []),
        *([_task_section(tested)] if tested else []),
        *(_generation_section(one) for one in generations if one.figures or one.cloze or one.samples.get("greedy")),
        *(_chat_section(report) for report in reports if report.chat is not None),
        *(_speed_section(report.speed) for report in reports if report.speed is not None),
    ]


def _differs(known: Mapping[str, object], others: Mapping[str, object]) -> bool:
    """Whether the same was measured with another outcome: in other windows, on fewer questions."""
    return any(known.get(name, one) != one for name, one in others.items())


def _labels(measured: Sequence[EvalReport | ModelSpeed]) -> list[str]:
    """Short labels of models: the last part of the name if it is unique, and the revision if needed."""
    models = [(one.model, getattr(one, "revision", None)) for one in measured]
    alike = len({short(name) for name, _ in models}) < len({name for name, _ in models})
    return names_apart(models if alike else [(short(name), revision) for name, revision in models])


def _perplexity_section(found: Mapping[str, Mapping[str, Perplexity]]) -> Section:
    """Perplexities; where models read a text in other tokens, their bits per byte."""
    digests: defaultdict[str, set[str]] = defaultdict(set)
    for text, one in (each for values in found.values() for each in values.items()):
        digests[text].add(one.text_digest)
    alike = {text: len(several) == 1 for text, several in digests.items()}

    def cell(text: str, one: Perplexity) -> str:
        return number(one.value, 2) if alike[text] else number(one.bits_per_byte, 3)

    rows = [
        [model, *(cell(text, values[text]) if text in values else "" for text in alike)]
        for model, values in found.items()
    ]
    headings = [short(text) if same else f"{short(text)}, bits/byte" for text, same in alike.items()]
    tables = [("Lower is better", (["model", *headings], rows))]
    return Section(name="perplexity", title="Perplexity", tables=tables)


def _task_section(tested: Mapping[str, Mapping[str, TaskResult]]) -> Section:
    """Accuracies; a task that a model was not asked has an empty cell, and is not in the figure."""
    names = dict.fromkeys(name for tasks in tested.values() for name in tasks)
    rows = [[name, *(accuracy(tasks[name]) if name in tasks else "" for tasks in tested.values())] for name in names]
    shared = [name for name in names if all(name in tasks for tasks in tested.values())]
    drawn = {model: {name: tasks[name] for name in shared} for model, tasks in tested.items()}
    return Section(
        name="tasks", title="Questions answered without examples",
        figures=[model_figures.accuracy(drawn)] if shared else [],
        tables=[("Accuracy and standard error", (["task", *tested], rows))],
    )  # fmt: skip


def _generation_section(generation: GenerationReport) -> Section:
    """Generated texts side by side, with their measures."""
    rows = [
        [f"{name}, {mode}", *(number(getattr(figures[mode], key), 1, factor) for key, _, factor in MEASURES)]
        for mode in ("greedy", "sampled")
        for name, figures in (("dense", generation.dense_figures or {}), ("pruned", generation.figures))
        if mode in figures
    ]
    said = []
    if generation.token_agreement is not None:
        said.append(words("token_agreement", share=generation.token_agreement))
    facts = {name: one for name, one in (("dense", generation.dense_cloze), ("pruned", generation.cloze)) if one}
    if facts:
        accuracies = {name: one.accuracy for name, one in facts.items()}
        said.append(words("facts", prompts=next(iter(facts.values())).prompts, facts=accuracies))
    answers = [
        (prompt, tuple((name, texts[name]) for name in ("dense", "pruned") if name in texts))
        for prompt, texts in generation.samples.get("greedy", {}).items()
    ]
    caption = "Generated text: diversity, repetition, and perplexity under the dense model"
    tables = [(caption, (["model, mode", *(label for _, label, _ in MEASURES)], rows))] if rows else []
    return Section(name="answers", title="Answers side by side", paragraphs=said, tables=tables, answers=answers)


def _chat_section(report: EvalReport) -> Section:
    """Perplexity of the answers in conversations."""
    parts = [part for part in (report.dense, report) if part is not None]
    found = {name: part.chat for name, part in zip(_labels(parts), parts, strict=True) if part.chat is not None}
    rows = [[name, number(one.value, 2), f"{one.tokens:,}", str(one.turns)] for name, one in found.items()]
    table = ["model", "perplexity", "tokens", "answers"], rows
    return Section(
        name="conversations", title="Answers in conversations", tables=[("Given all messages before", table)]
    )


def _speed_section(speed: SpeedReport) -> Section:
    """Tokens per second; the baseline model comes first."""
    measured = [one for one in (speed.against, speed.model) if one is not None]
    models = dict(zip(_labels(measured), measured, strict=True))
    rows = [
        [name, number(one.prefill, 1), number(one.decode, 1), f"{one.bytes_per_token:,}"]
        for name, one in models.items()
    ]
    table = ["model", "prefill", "decode", "bytes read per decoded token"], rows
    tables = [(words("speed_table", speed=speed), table)]
    return Section(name="speed", title="Speed", figures=[model_figures.speeds(models)], tables=tables)


def environment_section(made: Comparison | RunManifest, reports: Sequence[EvalReport]) -> Section:
    """Commands, settings and versions."""
    tuned = made.recovery if isinstance(made, RunManifest) else None
    commands = [made.command, () if tuned is None else tuned.command, *(report.command for report in reports)]
    settings = [[name, _plain(value)] for name, value in made.settings.items() if value is not None]
    versions = [[name, version] for name, version in made.versions.items()]
    return Section(
        name="environment",
        title="How to reproduce it",
        code="\n".join(f"saap {shlex.join(command)}" for command in commands if command),
        tables=[("Settings", (["setting", "value"], settings)), ("Versions", (["package", "version"], versions))],
    )


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return value if isinstance(value, str) else json.dumps(value)
