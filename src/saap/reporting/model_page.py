"""The page about a pruned model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saap.core.manifest import RunManifest
from saap.core.storage import TrailEntry, read_plan_document
from saap.reporting import model_figures as drawn
from saap.reporting.comparison_page import ratio_section
from saap.reporting.figures import Figure
from saap.reporting.importance import Agreement, GroupView, agreement, read_views
from saap.reporting.inputs import Evaluation, PlanGroup, plan_groups
from saap.reporting.page import Page, Section
from saap.reporting.sections import environment_section, evaluation_sections
from saap.reporting.tables import Table, number
from saap.settings.prune import FusionScope

ENOUGH = 200
"""Units of a role from which distributions of their scores say something."""


def model_page(
    folder: Path, manifest: RunManifest, reports: Sequence[Evaluation], comparison: Mapping[str, Any] | None
) -> Page:
    """The page of a folder that `saap prune` wrote. reports: of `saap eval`. comparison: baselines to show with it.

    Raises PlanError, StaleInputError or EvaluationError for a damaged folder.
    """
    plan_file, scores_file = (folder / "saap" / name for name in ("plan.json", "scores.safetensors"))
    plan = read_plan_document(plan_file)
    groups = plan_groups(plan, plan_file)
    scope = manifest.settings.get("fusion_scope", FusionScope.LAYER_ROLE)
    views = read_views(scores_file, groups, scope) if scores_file.is_file() else []
    sections = [
        _structure_section([group for group in groups.values() if group.layer >= 0], plan.dropped_blocks),
        *([_importance_section(views)] if views else []),
        *_search_sections(plan.trail),
        *([] if comparison is None else [ratio_section(comparison)]),
        *evaluation_sections(reports),
        *_recovery_sections(manifest),
        _stages_section(manifest),
        environment_section([manifest.command, *(report.command for report in reports)], manifest.versions,
                            manifest.settings),
    ]  # fmt: skip
    summary = (
        f"{manifest.base.source} lost {manifest.block_parameters.removed:.0%} of the parameters of its decoder blocks "
        f"({manifest.parameters.removed:.0%} of all its parameters)."
    )
    tiles = [
        (f"{manifest.parameters.after:,}", f"parameters, of {manifest.parameters.before:,}"),
        (_size(manifest.bytes.after), f"of weights, of {_size(manifest.bytes.before)}"),
    ]
    found = manifest.perplexity
    if found is not None:
        summary += (
            f" How surprised it is by the next word (perplexity, lower is better) went from {found.before:.1f} to "
            f"{found.after:.1f} on {found.text}."
        )
        tiles.append((f"{found.after / found.before:.2f} x", "the dense model's perplexity"))
    tiles.append((_duration(sum(stage.seconds for stage in manifest.stages)), "to make it"))
    return Page(title=f"{folder.name}, pruned by saap", summary=summary, tiles=tiles, sections=sections)


def _duration(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds < 300 else f"{seconds / 60:,.0f} min"


def _size(count: int) -> str:
    return f"{count / 1e6:,.0f} MB" if count >= 10**7 else f"{count / 1e3:,.0f} kB"


def _structure_section(groups: Sequence[PlanGroup], dropped: Sequence[int]) -> Section:
    by_role: dict[str, list[PlanGroup]] = {}
    for group in groups:
        by_role.setdefault(group.role, []).append(group)
    pruned = [role for role, same in by_role.items() if any(group.kept < group.of for group in same)]
    words = f"Whole blocks that left: {', '.join(map(str, dropped))}." if dropped else "Every block is still there."
    words += "".join(f" Nothing was taken from {role}." for role in by_role if role not in pruned)
    cells = {(group.layer, group.role): f"{group.kept} of {group.of}" for group in groups}
    layers = sorted({group.layer for group in groups})
    rows = [[str(layer), *(cells.get((layer, role), "") for role in by_role)] for layer in layers]
    return Section(
        name="structure",
        title="What stays",
        paragraphs=[words],
        figures=[drawn.structure(by_role[role]) for role in pruned],
        tables=[("Kept units of each layer", (["layer", *by_role], rows))],
    )


def _importance_section(views: Sequence[GroupView]) -> Section:
    """What the scores of each role say, one module a layer."""
    by_role = {
        role: sorted({view.layer: view for view in views if view.role == role}.values(), key=lambda view: view.layer)
        for role in dict.fromkeys(view.role for view in views)
    }
    name, title = "importance", "Importance of every unit"
    if not any(view.fluctuation.any() for view in views):  # one score a unit, without a spread over the samples
        words = "This method gives each unit one score, so there is nothing to fuse and no fluctuation."
        return Section(name=name, title=title, paragraphs=[words], tables=[("The scores", _score_table(by_role))])
    found = {role: [agreement(view) for view in same] for role, same in by_role.items()}
    figures: list[Figure] = []
    tables = [("Do the scores agree? Means over the layers", _agreement_table(by_role, found))]
    for role, same in by_role.items():
        if sum(len(view.fused) for view in same) < ENOUGH:
            continue
        figures += [
            drawn.importance_by_layer(same),
            drawn.importance_distribution(same),
            drawn.rank_agreement(same, found[role]),
            *([drawn.changed_sides(same, found[role])] if any(one.changed is not None for one in found[role]) else []),
            drawn.fluctuation(same),
        ]
        tables.append((f"{role} units, layer by layer", _layer_table(same, found[role])))
    words = (
        "Each unit has a coarse score (vector: what the loss does when the whole unit goes) and a fine one (element: "
        "summed over its single weights); the fusion makes one of them, weighing each by how much it scatters."
    )
    return Section(name=name, title=title, paragraphs=[words], figures=figures, tables=tables)


def _score_table(by_role: Mapping[str, Sequence[GroupView]]) -> Table:
    rows = []
    for role, same in by_role.items():
        values = np.concatenate([view.element for view in same])
        rows.append([role, f"{len(values):,}", *(f"{np.percentile(values, at):.3g}" for at in (10, 50, 90))])
    return ["role", "units", "tenth", "median", "nine tenths"], rows


def _agreement_table(by_role: Mapping[str, Sequence[GroupView]], found: Mapping[str, Sequence[Agreement]]) -> Table:
    columns = {
        "vector ~ element": "vector_element", "vector ~ fused": "vector_fused", "element ~ fused": "element_fused",
        "others than vector removes": "changed_from_vector", "others than element removes": "changed",
    }  # fmt: skip
    rows = [
        [role, f"{sum(len(view.fused) for view in same):,}",
         *(_agreement_cell(field, (getattr(one, field) for one in found[role])) for field in columns.values())]
        for role, same in by_role.items()
    ]  # fmt: skip
    return ["role", "units", *columns], rows


def _layer_table(same: Sequence[GroupView], found: Sequence[Agreement]) -> Table:
    columns = {
        "vector ~ element": "vector_element", "element ~ fused": "element_fused",
        "others than vector": "changed_from_vector", "others than element": "changed",
    }  # fmt: skip
    rows = [
        [str(view.layer), f"{int(view.kept.sum()):,} of {len(view.kept):,}",
         *(_agreement_cell(field, [getattr(one, field)]) for field in columns.values())]
        for view, one in zip(same, found, strict=True)
    ]  # fmt: skip
    return ["layer", "kept", *columns], rows


def _agreement_cell(field: str, values: Iterable[float | None]) -> str:
    """The mean of what is a number: a correlation, or a share of changed units."""
    known = [value for value in values if value is not None and np.isfinite(value)]
    if not known:
        return ""
    mean = float(np.mean(known))
    return f"{mean:.0%}" if field.startswith("changed") else number(mean, 2)


def _search_sections(trail: Sequence[TrailEntry]) -> list[Section]:
    measured = [(entry.name, entry.loss) for entry in trail if entry.loss is not None]
    if not measured:
        return []
    words = "Each candidate was tried by masking, before anything was cut, on text kept apart for this."
    figures = [drawn.trail(measured)]
    return [Section(name="search", title="How the structure was found", paragraphs=[words], figures=figures)]


def _recovery_sections(manifest: RunManifest) -> list[Section]:
    """The loss curve and the answers before and after, where a recovery left them in the manifest."""
    sections = []
    curves: dict[str, list[tuple[float, float]]] = {}
    for point in () if manifest.recovery is None else manifest.recovery.curve:
        for value, label in ((point.loss, "training"), (point.validation, "validation")):
            if value is not None:
                curves.setdefault(label, []).append((point.step, value))
    if curves:
        sections.append(Section(name="recovery", title="Recovery, step by step", figures=[drawn.losses(curves)]))
    answers = {} if manifest.answers is None else manifest.answers.model_dump()
    prompt = answers.pop("prompt", "")
    texts = tuple((name, text) for name, text in answers.items() if text)
    if texts:
        sections.append(Section(name="answer", title="One answer, step by step", answers=[(prompt, texts)]))
    return sections


def _stages_section(manifest: RunManifest) -> Section:
    costs = manifest.stages
    rows = [[cost.name, f"{cost.seconds:.1f}", f"{cost.peak_resident_bytes / 1e9:.2f}"] for cost in costs]
    return Section(
        name="stages",
        title="Time and memory",
        figures=[drawn.stages(costs)] if costs else [],
        tables=[("The same in numbers", (["stage", "seconds", "memory, GB"], rows))],
        fold_tables=True,
    )
