"""`saap report`: from a pruned model's folder or a comparison, and reports of `saap eval`, to one page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from saap.config import FusionScope
from saap.errors import EvaluationError, OutputError
from saap.estimation.fusion import closed_form_sigma, fused
from saap.export.manifest import RunManifest
from saap.pipeline.compare import FILE as COMPARISON
from saap.records import ImportanceScores
from saap.reporting import figures
from saap.reporting.figures import Figure, write_figures
from saap.reporting.importance import GroupView, agreement, by_layer, mean_known
from saap.reporting.page import Page, Section, render
from saap.reporting.tables import comparison_table, number, ratio_table, short
from saap.storage import parse_units, read_scores, write_whole


def build_page(source: Path, evaluations: Sequence[Path] = ()) -> Page:
    """The report of a folder that `saap prune` or `saap compare` wrote.

    evaluations: JSON files that `saap eval --out` wrote. Raises EvaluationError for anything else.
    """
    reports = [_read_json(path, "a report of `saap eval --out`") for path in evaluations]
    for path, report in zip(evaluations, reports, strict=True):
        if not {"model", "perplexity", "tasks"} <= set(report):
            raise EvaluationError(f"{path} is no report of `saap eval --out`", "Give the file that --out wrote")
    file = source / COMPARISON if source.is_dir() else source
    if file.name == COMPARISON and file.is_file():
        return _comparison_page(_read_json(file, "a comparison"), reports)
    if not (source / "saap" / "manifest.json").is_file():
        raise EvaluationError(
            f"{source} was written neither by `saap prune` nor by `saap compare`",
            "Name a folder that one of them wrote",
        )
    return _model_page(source, reports)


def write_page(page: Page, out: Path, figure_folder: Path | None) -> list[Path]:
    """Write the page, and its figures as files if a folder is named. Returns the paths."""
    try:
        write_whole(out, render(page).encode())
        return [out, *([] if figure_folder is None else write_figures(page.figures, figure_folder))]
    except OSError as error:
        raise OutputError(f"{out} cannot be written ({error.strerror})", "Choose another --out") from error


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EvaluationError(f"{path} cannot be read as {what} ({error})", "Give another file") from None
    if not isinstance(content, dict):
        raise EvaluationError(f"{path} is not {what}", "Give another file")
    return content


def _model_page(folder: Path, reports: Sequence[dict[str, Any]]) -> Page:
    manifest = _manifest(folder / "saap" / "manifest.json")
    plan = _read_json(folder / "saap" / "plan.json", "a plan")
    scores_file = folder / "saap" / "scores.safetensors"
    views = _views(read_scores(scores_file), plan, manifest) if scores_file.is_file() else []
    found = manifest.perplexity
    ratio = found.after / found.before if found is not None else None
    sections = [
        _structure_section(plan),
        *([_importance_section(views)] if views else []),
        *([_search_section(plan)] if plan.get("trail") else []),
        *_evaluation_sections(reports),
        *_recovery_sections(folder),
        _stages_section(manifest),
        _environment_section(manifest.command, manifest.versions, manifest.settings),
    ]
    removed = manifest.block_parameters.removed
    summary = (
        f"{manifest.base.source} lost {removed:.0%} of the parameters of its decoder blocks "
        f"({manifest.parameters.removed:.0%} of all)."
    )
    if found is not None:
        summary += (
            f" On {found.text}, how surprised it is by the next word (perplexity) went from {found.before:.1f} to "
            f"{found.after:.1f}; lower is better."
        )
    tiles = [
        (f"{manifest.parameters.after:,}", f"parameters of {manifest.parameters.before:,}"),
        (_size(manifest.bytes.after), f"of {_size(manifest.bytes.before)} of weights"),
        *([(f"{ratio:.2f} x", "the dense model's perplexity")] if ratio is not None else []),
        (f"{sum(stage.seconds for stage in manifest.stages):,.0f} s", "to make it"),
    ]
    return Page(title=f"{folder.name}, pruned by saap", summary=summary, tiles=tuple(tiles), sections=tuple(sections))


def _manifest(path: Path) -> RunManifest:
    try:
        return RunManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        where = ", ".join(".".join(map(str, fault["loc"])) or "the file" for fault in error.errors()[:3])
        raise EvaluationError(
            f"{path} is no manifest of this version ({where})", "Use the saap that wrote it, or prune again"
        ) from None


def _group_place(name: str) -> tuple[int, str]:
    """Layer and role of a group by its name, "layers.3.ffn"; groups of the whole model have layer -1."""
    parts = name.split(".")
    return (int(parts[1]), parts[2]) if len(parts) > 2 and parts[1].isdecimal() else (-1, parts[-1])


def _views(scores: ImportanceScores, plan: Mapping[str, Any], manifest: RunManifest) -> list[GroupView]:
    """The scores of every module that can be pruned, fused as the run fused them."""
    scope = FusionScope(manifest.settings.get("fusion_scope", FusionScope.LAYER_ROLE))
    names = [name for name in scores.groups if name in plan["groups"] and _group_place(name)[0] >= 0]
    shared: dict[tuple[object, ...], list[str]] = {}
    for name in names:
        layer, role = _group_place(name)
        keys: dict[FusionScope, tuple[object, ...]] = {
            FusionScope.GLOBAL: (), FusionScope.ROLE: (role,), FusionScope.LAYER: (layer,),
            FusionScope.LAYER_ROLE: (layer, role),
        }  # fmt: skip
        shared.setdefault(keys[scope], []).append(name)
    views = {}
    for same in shared.values():
        sigmas = [
            closed_form_sigma(np.concatenate([getattr(scores.groups[name], kind) for name in same]))
            for kind in ("vector", "element")
        ]
        for name in same:
            unit = fused(scores.groups[name], sigmas[0], sigmas[1], max(scores.samples, 2))
            kept = np.zeros(len(unit.mean), dtype=bool)
            kept[list(parse_units(plan["groups"][name]["units"]))] = True
            layer, role = _group_place(name)
            views[name] = GroupView(
                name=name, layer=layer, role=role, vector=scores.groups[name].vector,
                element=scores.groups[name].element, fused=unit.mean, fluctuation=unit.variance, kept=kept,
            )  # fmt: skip
    return [views[name] for name in names]


def _structure_section(plan: Mapping[str, Any]) -> Section:
    rows = [
        {"layer": _group_place(name)[0], "role": _group_place(name)[1], "kept": entry["kept"], "of": entry["of"]}
        for name, entry in plan["groups"].items()
        if _group_place(name)[0] >= 0
    ]
    roles = list(dict.fromkeys(row["role"] for row in rows))
    dropped = plan.get("dropped_blocks") or ()
    words = f"Whole blocks that left: {', '.join(map(str, dropped))}." if dropped else "Every block is still there."
    layers = sorted({row["layer"] for row in rows})
    by_place = {(row["layer"], row["role"]): f"{row['kept']} of {row['of']}" for row in rows}
    rows_by_layer = [[str(layer), *(by_place.get((layer, role), "") for role in roles)] for layer in layers]
    return Section(
        name="structure",
        title="What stays",
        paragraphs=(words,),
        figures=tuple(figures.structure(rows, role) for role in roles),
        tables=(("Kept units of each layer", (["layer", *roles], rows_by_layer)),),
    )


def _importance_section(views: Sequence[GroupView]) -> Section:
    roles = list(dict.fromkeys(view.role for view in views))
    agreements = {view.name: agreement(view) for view in views}
    drawn: list[Figure] = []
    rows = []
    for role in roles:
        mine = by_layer(views, role)
        units = sum(len(view.fused) for view in mine.values())
        pairs = {
            layer: (agreements[view.name].vector_element, agreements[view.name].element_fused)
            for layer, view in mine.items()
        }
        if units >= 200:
            drawn += [
                figures.importance_distribution(views, role),
                figures.rank_agreement(pairs, role),
                figures.fluctuation(views, role),
            ]
        found = [agreements[view.name] for view in mine.values()]
        rows.append(
            [
                role,
                str(units),
                number(mean_known([one.vector_element for one in found]), 2),
                number(mean_known([one.vector_fused for one in found]), 2),
                number(mean_known([one.element_fused for one in found]), 2),
                _percent(mean_known([one.changed for one in found])),
            ]
        )
    headings = ["role", "units", "vector ~ element", "vector ~ fused", "element ~ fused", "removed units that change"]
    return Section(
        name="importance",
        title="Importance of every unit",
        paragraphs=(
            "Each unit has a coarse score (vector) and a fine one (element); the fusion makes one of them. The table "
            "has the mean rank correlation inside a layer, and how many of the removed units would be others if the "
            "fine score alone decided.",
        ),
        figures=tuple(drawn),
        tables=(("Do the scores agree?", (headings, rows)),),
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _size(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 10**7 else f"{count / 1e3:,.0f} kB"


def _search_section(plan: Mapping[str, Any]) -> Section:
    return Section(
        name="search",
        title="How the structure was found",
        paragraphs=("Each candidate was tried by masking, before anything was cut, on text kept apart for this.",),
        figures=(figures.trail(plan["trail"]),),
    )


def _evaluation_sections(reports: Sequence[dict[str, Any]]) -> list[Section]:
    """Perplexities, tasks and answers of `saap eval`, the dense model beside them where it was measured."""
    sections = []
    columns: dict[str, dict[str, Any]] = {}
    for report in reports:
        for part in (report.get("dense"), report):
            if part is not None:
                columns[part["model"]] = part
    texts = list(dict.fromkeys(text for part in columns.values() for text in part["perplexity"]))
    if texts:
        rows = [[short(name), *(number(_value(part, text), 2) for text in texts)] for name, part in columns.items()]
        table = ["model", *map(short, texts)], rows
        sections.append(Section(name="perplexity", title="Perplexity", tables=(("Lower is better", table),)))
    tested = {short(name): part["tasks"] for name, part in columns.items() if part["tasks"]}
    if tested:
        names = list(next(iter(tested.values())))
        common = {model: tasks for model, tasks in tested.items() if list(tasks) == names}
        rows = [
            [name, *(f"{tasks[name]['acc']:.3f} ± {tasks[name]['acc_stderr']:.3f}" for tasks in common.values())]
            for name in names
        ]
        table = ["task", *common], rows
        sections.append(
            Section(
                name="tasks",
                title="Questions answered without examples",
                figures=(figures.accuracy(common),),
                tables=(("Accuracy and standard error", table),),
            )
        )
    answers = [
        (prompt, tuple(texts.items()))
        for report in reports
        if report.get("generation")
        for prompt, texts in report["generation"]["samples"].get("greedy", {}).items()
    ]
    if answers:
        sections.append(Section(name="answers", title="Answers side by side", answers=tuple(answers)))
    return sections


def _value(part: Mapping[str, Any], text: str) -> float | None:
    found = part["perplexity"].get(text)
    return None if found is None else found["value"]


def _recovery_sections(folder: Path) -> list[Section]:
    """The loss curve and the answers before and after, where a recovery left them in the manifest."""
    record = _read_json(folder / "saap" / "manifest.json", "a manifest")
    sections = []
    curves: dict[str, list[tuple[float, float]]] = {}
    for point in (record.get("recovery") or {}).get("curve") or ():
        for name, label in (("loss", "training"), ("validation", "validation")):
            if point.get(name) is not None:
                curves.setdefault(label, []).append((float(point["step"]), float(point[name])))
    if curves:
        sections.append(Section(name="recovery", title="Recovery", figures=(figures.losses(curves),)))
    answers = record.get("answers") or {}
    texts = tuple((name, text) for name, text in answers.items() if name != "prompt" and text)
    if texts:
        sections.append(Section(name="answer", title="One answer, step by step", answers=((answers["prompt"], texts),)))
    return sections


def _stages_section(manifest: RunManifest) -> Section:
    costs = [stage.model_dump() for stage in manifest.stages]
    rows = [[cost["name"], f"{cost['seconds']:.1f}", f"{cost['peak_resident_bytes'] / 1e9:.2f}"] for cost in costs]
    return Section(
        name="stages",
        title="Time and memory",
        figures=(figures.stages(costs),) if costs else (),
        tables=(("Each stage", (["stage", "seconds", "memory, GB"], rows)),),
    )


def _environment_section(command: Sequence[str], versions: Mapping[str, str], settings: Mapping[str, Any]) -> Section:
    return Section(
        name="environment",
        title="How to do it again",
        tables=(
            ("Settings", (["setting", "value"], [[name, json.dumps(value)] for name, value in settings.items()])),
            ("Versions", (["package", "version"], [[name, value] for name, value in versions.items()])),
        ),
        code=f"saap {shlex.join(command)}" if command else "",
    )


def _comparison_page(comparison: Mapping[str, Any], reports: Sequence[dict[str, Any]]) -> Page:
    texts = list(comparison["dense"]["perplexity"])
    kinds = sorted({bool(row["restored"]) for row in comparison["rows"]})
    drawn = [figures.perplexity_by_ratio(comparison, text, restored) for text in texts for restored in kinds]
    tables = [
        (
            f"{short(text)}, perplexity / dense, {'with restoration' if restored else 'cut only'}",
            ratio_table(comparison, text, restored),
        )
        for text in texts
        for restored in kinds
    ]
    rows = comparison["rows"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    ratios = sorted({row["ratio"] for row in rows})
    best = min(
        (row for row in rows if row["ratios"][texts[0]]), key=lambda row: (row["ratio"], row["ratios"][texts[0]])
    )
    summary = (
        f"{len(methods)} methods removed the same share of {comparison['model']}, calibrated on the same text. At "
        f"{best['ratio']:.0%} removed, {best['method']}{' with restoration' if best['restored'] else ''} stays nearest "
        f"to the dense model on {short(texts[0])}: {best['ratios'][texts[0]]:.2f} times its perplexity."
    )
    sections = [
        Section(name="ratios", title="Perplexity by pruning ratio", figures=tuple(drawn), tables=tuple(tables)),
        *_task_sections(comparison),
        Section(name="rows", title="All that was measured", tables=(("Every row", comparison_table(comparison)),)),
        *_evaluation_sections(reports),
        _environment_section((), comparison["versions"], comparison["settings"]),
    ]
    tiles = (
        (str(len(methods)), "methods"),
        (", ".join(f"{ratio:.0%}" for ratio in ratios), "removed"),
        (f"{comparison['dense']['parameters']:,}", "parameters of the dense model"),
        (number(comparison["dense"]["perplexity"][texts[0]]["value"], 2), f"its perplexity on {short(texts[0])}"),
    )
    return Page(
        title=f"Methods compared on {comparison['model']}", summary=summary, tiles=tiles, sections=tuple(sections)
    )


def _task_sections(comparison: Mapping[str, Any]) -> list[Section]:
    """Zero-shot accuracy at the middle ratio, where tasks were asked."""
    if not comparison["dense"]["tasks"]:
        return []
    ratios = sorted({row["ratio"] for row in comparison["rows"]})
    middle = ratios[len(ratios) // 2]
    shown = {"dense": comparison["dense"]["tasks"]}
    for row in comparison["rows"]:
        label = f"{row['method']}{', restored' if row['restored'] else ''}"
        if row["ratio"] == middle and label not in shown and len(shown) < len(figures.COLOURS):
            shown[label] = row["tasks"]
    title = f"Questions answered without examples, {middle:.0%} removed"
    return [Section(name="tasks", title=title, figures=(figures.accuracy(shown),))]
