"""The page about a pruned model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saap.core.errors import EvaluationError, PlanError
from saap.core.manifest import RunManifest
from saap.core.records import ImportanceScores, Role
from saap.core.storage import STATISTICS, PlanDocument, TrailEntry, parse_units, read_plan_document, read_scores
from saap.estimation.fusion import closed_form_sigma, fused
from saap.reporting import model_figures as drawn
from saap.reporting.comparison_page import ratio_section
from saap.reporting.figures import Figure
from saap.reporting.importance import Agreement, GroupView, agreement, by_layer, mean_known
from saap.reporting.page import Page, Section
from saap.reporting.sections import environment_section, evaluation_sections
from saap.reporting.tables import number
from saap.settings.prune import FusionScope

LARGEST = 1e100
"""Scores below this can be fused and drawn."""
_PLACE = re.compile(rf"(layers\.(?P<layer>[0-9]{{1,6}})\.)?(?P<role>{'|'.join(Role)})(\.|$)", re.ASCII)
ENOUGH = 200
"""Units of a role from which distributions of their scores say something."""


def model_page(
    folder: Path, manifest: RunManifest, reports: Sequence[Mapping[str, Any]], comparison: Mapping[str, Any] | None
) -> Page:
    """The page of a folder that `saap prune` wrote. reports: of `saap eval`. comparison: baselines to show beside it.

    Raises PlanError, StaleInputError or EvaluationError for a damaged folder.
    """
    plan = read_plan_document(folder / "saap" / "plan.json")
    groups = _groups(plan, folder)
    scores_file = folder / "saap" / "scores.safetensors"
    views = _views(scores_file, groups, manifest) if scores_file.is_file() else []
    found = manifest.perplexity
    sections = [
        _structure_section(groups, plan.dropped_blocks),
        *([_importance_section(views)] if views else []),
        *_search_sections(plan.trail),
        *([] if comparison is None else [ratio_section(comparison)]),
        *evaluation_sections(reports),
        *_recovery_sections(manifest),
        _stages_section(manifest),
        environment_section(
            [manifest.command, *(report.get("command", ()) for report in reports)],
            manifest.versions,
            manifest.settings,
        ),
    ]
    removed = manifest.block_parameters.removed
    summary = (
        f"{manifest.base.source} lost {removed:.0%} of the parameters of its decoder blocks "
        f"({manifest.parameters.removed:.0%} of all its parameters)."
    )
    if found is not None:
        summary += (
            f" How surprised it is by the next word (perplexity, lower is better) went from {found.before:.1f} to "
            f"{found.after:.1f} on {found.text}."
        )
    tiles = [
        (f"{manifest.parameters.after:,}", f"parameters, of {manifest.parameters.before:,}"),
        (_size(manifest.bytes.after), f"of weights, of {_size(manifest.bytes.before)}"),
        *([(f"{found.after / found.before:.2f} x", "the dense model's perplexity")] if found is not None else []),
        (_duration(sum(stage.seconds for stage in manifest.stages)), "to make it"),
    ]
    return Page(title=f"{folder.name}, pruned by saap", summary=summary, tiles=tuple(tiles), sections=tuple(sections))


def _duration(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 300 else f"{seconds / 60:,.0f} min"


@dataclass(frozen=True, slots=True)
class _Group:
    """A group of the plan that can be shown. layer: -1 for the whole model's. units: the kept ones, as runs."""

    layer: int
    role: str
    kept: int
    of: int
    units: str | None


def _groups(plan: PlanDocument, folder: Path) -> dict[str, _Group]:
    """The groups by name, "layers.3.ffn" or "hidden". Raises PlanError for what is no group of a written plan."""
    found = {}
    for name, entry in plan.groups.items():
        place = _PLACE.match(name)
        if place is None or entry.kept is None or entry.of is None or entry.kept > entry.of:
            raise PlanError(
                f"{folder / 'saap' / 'plan.json'} has a group {name[:60]!r} that no run has written",
                "Use the folder as `saap prune` wrote it",
            )
        found[name] = _Group(int(place["layer"] or -1), place["role"], entry.kept, entry.of, entry.units)
    return found


def _views(file: Path, groups: Mapping[str, _Group], manifest: RunManifest) -> list[GroupView]:
    """The scores of every module that can be pruned, fused as the run fused them.

    Raises EvaluationError for scores that do not fit the plan, or cannot be shown.
    """
    scores = read_scores(file)
    try:
        scope = FusionScope(manifest.settings.get("fusion_scope", FusionScope.LAYER_ROLE))
        kept = {name: _kept(scores, name, group) for name, group in groups.items() if name in scores.groups}
    except ValueError as error:
        raise EvaluationError(
            f"{file} does not fit the plan and the manifest beside it ({error})", "Use the folder as it was written"
        ) from None
    shared: dict[tuple[object, ...], list[str]] = {}
    for name in kept:
        layer, role = groups[name].layer, groups[name].role
        keys: dict[FusionScope, tuple[object, ...]] = {
            FusionScope.GLOBAL: (), FusionScope.ROLE: (role,), FusionScope.LAYER: (layer,),
            FusionScope.LAYER_ROLE: (layer, role),
        }  # fmt: skip
        if layer >= 0:
            shared.setdefault(keys[scope], []).append(name)
    views = {}
    for same in shared.values():
        sigmas = [
            closed_form_sigma(np.concatenate([getattr(scores.groups[name], kind) for name in same]))
            for kind in ("vector", "element")
        ]
        for name in same:
            unit = fused(scores.groups[name], sigmas[0], sigmas[1], max(scores.samples, 2))
            views[name] = GroupView(
                name=name, layer=groups[name].layer, role=groups[name].role, vector=scores.groups[name].vector,
                element=scores.groups[name].element, fused=unit.mean, fluctuation=unit.variance, kept=kept[name],
            )  # fmt: skip
    return [views[name] for name in kept if name in views]


def _kept(scores: ImportanceScores, name: str, group: _Group) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which units of a group stay, (units,). Raises ValueError where that, or its scores, cannot be known."""
    arrays = [getattr(scores.groups[name], statistic) for statistic in STATISTICS]
    if len(arrays[0]) != group.of or group.units is None:
        raise ValueError(f"{name} has scores of {len(arrays[0])} units")
    if not all(np.abs(array).max(initial=0) < LARGEST for array in arrays):  # also where one is no number
        raise ValueError(f"{name} has scores that are no finite numbers")
    kept = np.zeros(group.of, dtype=bool)
    kept[list(parse_units(group.units, group.of))] = True
    return kept


def _structure_section(groups: Mapping[str, _Group], dropped: Sequence[int]) -> Section:
    rows: list[dict[str, Any]] = [
        {"layer": group.layer, "role": group.role, "kept": group.kept, "of": group.of}
        for group in groups.values()
        if group.layer >= 0
    ]
    roles = list(dict.fromkeys(row["role"] for row in rows))
    whole = [role for role in roles if all(row["kept"] == row["of"] for row in rows if row["role"] == role)]
    words = f"Whole blocks that left: {', '.join(map(str, dropped))}." if dropped else "Every block is still there."
    words += "".join(f" Nothing was taken from {role}." for role in whole)
    layers = sorted({row["layer"] for row in rows})
    by_place = {(row["layer"], row["role"]): f"{row['kept']} of {row['of']}" for row in rows}
    rows_by_layer = [[str(layer), *(by_place.get((layer, role), "") for role in roles)] for layer in layers]
    return Section(
        name="structure",
        title="What stays",
        paragraphs=(words,),
        figures=tuple(drawn.structure(rows, role) for role in roles if role not in whole),
        tables=(("Kept units of each layer", (["layer", *roles], rows_by_layer)),),
    )


def _importance_section(views: Sequence[GroupView]) -> Section:
    roles = list(dict.fromkeys(view.role for view in views))
    if not any(view.fluctuation.any() for view in views):
        return _single_score_section(views, roles)
    agreements = {view.name: agreement(view) for view in views}
    figures: list[Figure] = []
    tables = [("Do the scores agree? Means over the layers", _agreement_table(views, agreements, roles))]
    for role in roles:
        mine = by_layer(views, role)
        found = {layer: agreements[view.name] for layer, view in mine.items()}
        if sum(len(view.fused) for view in mine.values()) < ENOUGH:
            continue
        figures += [
            drawn.importance_by_layer(views, role),
            drawn.importance_distribution(views, role),
            drawn.rank_agreement(found, role),
            *([drawn.changed_sides(found, role)] if any(one.changed is not None for one in found.values()) else []),
            drawn.fluctuation(views, role),
        ]
        tables.append((f"{role} units, layer by layer", _layer_table(mine, found)))
    return Section(
        name="importance",
        title="Importance of every unit",
        paragraphs=(
            "Each unit has a coarse score (vector: what the loss does when the whole unit goes) and a fine one "
            "(element: summed over its single weights); the fusion makes one of them, weighing each by how much it "
            "scatters.",
        ),
        figures=tuple(figures),
        tables=tuple(tables),
    )


def _single_score_section(views: Sequence[GroupView], roles: Sequence[str]) -> Section:
    """Of a method that gives each unit one score, without a spread over the samples."""
    rows = []
    for role in roles:
        values = np.concatenate([view.element for view in by_layer(views, role).values()])
        rows.append([role, f"{len(values):,}", *(f"{np.percentile(values, at):.3g}" for at in (10, 50, 90))])
    table = ["role", "units", "tenth", "median", "nine tenths"], rows
    return Section(
        name="importance",
        title="Importance of every unit",
        paragraphs=("This method gives each unit one score, so there is nothing to fuse and no fluctuation.",),
        tables=(("The scores", table),),
    )


def _agreement_table(
    views: Sequence[GroupView], agreements: Mapping[str, Agreement], roles: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    rows = []
    for role in roles:
        mine = by_layer(views, role).values()
        found = [agreements[view.name] for view in mine]
        rows.append(
            [
                role,
                f"{sum(len(view.fused) for view in mine):,}",
                *(
                    number(mean_known([getattr(one, pair) for one in found]), 2)
                    for pair in ("vector_element", "vector_fused", "element_fused")
                ),
                _percent(mean_known([one.changed_from_vector for one in found])),
                _percent(mean_known([one.changed for one in found])),
            ]
        )
    return [
        "role", "units", "vector ~ element", "vector ~ fused", "element ~ fused", "others than vector removes",
        "others than element removes",
    ], rows  # fmt: skip


def _layer_table(mine: Mapping[int, GroupView], found: Mapping[int, Agreement]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            str(layer),
            f"{int(view.kept.sum()):,} of {len(view.kept):,}",
            number(found[layer].vector_element, 2),
            number(found[layer].element_fused, 2),
            _percent(found[layer].changed_from_vector),
            _percent(found[layer].changed),
        ]
        for layer, view in sorted(mine.items())
    ]
    headings = ["layer", "kept", "vector ~ element", "element ~ fused", "others than vector", "others than element"]
    return headings, rows


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _size(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 10**7 else f"{count / 1e3:,.0f} kB"


def _search_sections(trail: Sequence[TrailEntry]) -> list[Section]:
    measured = [(entry.name, entry.loss) for entry in trail if entry.loss is not None]
    if not measured:
        return []
    words = "Each candidate was tried by masking, before anything was cut, on text kept apart for this."
    figures = (drawn.trail(measured),)
    return [Section(name="search", title="How the structure was found", paragraphs=(words,), figures=figures)]


def _recovery_sections(manifest: RunManifest) -> list[Section]:
    """The loss curve and the answers before and after, where a recovery left them in the manifest."""
    sections = []
    curves: dict[str, list[tuple[float, float]]] = {}
    for point in () if manifest.recovery is None else manifest.recovery.curve:
        for value, label in ((point.loss, "training"), (point.validation, "validation")):
            if value is not None:
                curves.setdefault(label, []).append((point.step, value))
    if curves:
        sections.append(Section(name="recovery", title="Recovery, step by step", figures=(drawn.losses(curves),)))
    answers = {} if manifest.answers is None else manifest.answers.model_dump()
    prompt = answers.pop("prompt", "")
    texts = tuple((name, text) for name, text in answers.items() if text)
    if texts:
        sections.append(Section(name="answer", title="One answer, step by step", answers=((prompt, texts),)))
    return sections


def _stages_section(manifest: RunManifest) -> Section:
    costs = [stage.model_dump() for stage in manifest.stages]
    rows = [[cost["name"], f"{cost['seconds']:.1f}", f"{cost['peak_resident_bytes'] / 1e9:.2f}"] for cost in costs]
    return Section(
        name="stages",
        title="Time and memory",
        figures=(drawn.stages(costs),) if costs else (),
        tables=(("The same in numbers", (["stage", "seconds", "memory, GB"], rows)),),
        fold_tables=True,
    )
