"""The sections that a page about a model and one about a comparison share."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from saap.reporting import model_figures
from saap.reporting.inputs import Evaluation, Generation, Measured, ModelSpeed, Speed
from saap.reporting.page import Section
from saap.reporting.tables import names_apart, number, short

MODES = ("greedy", "sampled")
MEASURES = (
    ("distinct_1", "distinct words, %", 100), ("distinct_2", "distinct pairs, %", 100),
    ("distinct_3", "distinct triples, %", 100), ("repetition", "repeated, %", 100), ("tokens", "tokens", 1),
    ("dense_perplexity", "perplexity under the dense model", 1),
)  # fmt: skip


def evaluation_sections(reports: Sequence[Evaluation]) -> list[Section]:
    """Perplexities, tasks, text and speed of `saap eval`, with the dense model where it was measured."""
    parts = [part for report in reports for part in (report.dense, report) if part is not None]
    columns: dict[str, Measured] = {}
    for label, part in zip(_labels(parts), parts, strict=True):
        known = columns.setdefault(label, Measured(model=label, perplexity={}, tasks={}))
        known.perplexity |= part.perplexity
        known.tasks |= part.tasks
    return [
        *_perplexity_sections(columns),
        *_task_sections(columns),
        *(section for report in reports for section in _writing_sections(report.generation)),
        *(_speed_section(report.speed) for report in reports if report.speed is not None),
    ]


def _labels(measured: Sequence[Measured | ModelSpeed]) -> list[str]:
    """What to call each model: the last part of its name where no other ends alike, and what tells revisions apart."""
    models = [(one.model, getattr(one, "revision", None)) for one in measured]
    alike = len({short(name) for name, _ in models}) < len({name for name, _ in models})
    return names_apart(models if alike else [(short(name), revision) for name, revision in models])


def _perplexity_sections(columns: Mapping[str, Measured]) -> list[Section]:
    texts = list(dict.fromkeys(text for part in columns.values() for text in part.perplexity))
    if not texts:
        return []
    rows = [
        [name, *(number(part.perplexity[text].value, 2) if text in part.perplexity else "" for text in texts)]
        for name, part in columns.items()
    ]
    table = ["model", *map(short, texts)], rows
    return [Section(name="perplexity", title="Perplexity", tables=[("Lower is better", table)])]


def _task_sections(columns: Mapping[str, Measured]) -> list[Section]:
    tested = {name: part.tasks for name, part in columns.items() if part.tasks}
    if not tested:
        return []
    names = list(next(iter(tested.values())))
    common = {model: tasks for model, tasks in tested.items() if list(tasks) == names}
    rows = [
        [name, *(f"{tasks[name].acc:.3f} ± {tasks[name].acc_stderr:.3f}" for tasks in common.values())]
        for name in names
    ]
    return [
        Section(
            name="tasks",
            title="Questions answered without examples",
            figures=[model_figures.accuracy(common)],
            tables=[("Accuracy and standard error", (["task", *common], rows))],
        )
    ]


def _writing_sections(generation: Generation | None) -> list[Section]:
    """What the models wrote, measured and side by side."""
    if generation is None:
        return []
    rows = []
    for mode in MODES:
        for name, figures in (("dense", generation.dense_figures), ("pruned", generation.figures)):
            if figures and mode in figures:
                values = [(getattr(figures[mode], key), factor) for key, _, factor in MEASURES]
                cells = [number(None if value is None else value * factor, 1) for value, factor in values]
                rows.append([f"{name}, {mode}", *cells])
    words = []
    if generation.token_agreement is not None:
        words.append(
            f"Reading what the dense model wrote, the pruned one would have gone on with the same token in "
            f"{generation.token_agreement:.0%} of the places."
        )
    facts = {name: one for name, one in (("dense", generation.dense_cloze), ("pruned", generation.cloze)) if one}
    if facts:
        asked = next(iter(facts.values())).prompts
        said = " and ".join(f"the {name} model {one.accuracy:.0%}" for name, one in facts.items())
        words.append(f"Of the facts that were asked ({asked} sentences to complete), {said} were completed rightly.")
    answers = [
        (prompt, tuple((name, texts[name]) for name in ("dense", "pruned") if name in texts))
        for prompt, texts in generation.samples.get("greedy", {}).items()
    ]
    if not rows and not answers:
        return []
    caption = "What was written: variety, repetition, and how likely the dense model finds it"
    tables = [(caption, (["model, mode", *(label for _, label, _ in MEASURES)], rows))] if rows else []
    title = "Answers side by side"
    return [Section(name="answers", title=title, paragraphs=words, tables=tables, answers=answers)]


def _speed_section(speed: Speed) -> Section:
    """Tokens per second; the model that it is compared with comes first."""
    measured = [one for one in (speed.against, speed.model) if one is not None]
    models = dict(zip(_labels(measured), measured, strict=True))
    rows = [
        [name, number(one.prefill, 1), number(one.decode, 1), f"{one.bytes_per_token:,}"]
        for name, one in zip(_labels(measured), measured, strict=True)
    ]
    caption = f"Tokens per second in {speed.runtime}, one sequence, weights {speed.weights}, {speed.threads} threads"
    table = ["model", "reading", "writing", "bytes read per written token"], rows
    return Section(name="speed", title="Speed", figures=[model_figures.speeds(models)], tables=[(caption, table)])


def environment_section(
    commands: Sequence[Sequence[str]], versions: Mapping[str, str], settings: Mapping[str, Any]
) -> Section:
    """Commands, settings and versions. commands: arguments of `saap`."""
    chosen = [[name, _plain(value)] for name, value in settings.items() if value is not None]
    return Section(
        name="environment",
        title="How to do it again",
        code="\n".join(f"saap {shlex.join(command)}" for command in commands if command),
        tables=[
            ("Settings", (["setting", "value"], chosen)),
            ("Versions", (["package", "version"], [[name, value] for name, value in versions.items()])),
        ],
    )


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return value if isinstance(value, str) else json.dumps(value)
