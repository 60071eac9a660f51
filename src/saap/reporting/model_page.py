"""The page about a pruned model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from saap.core.evaluation_records import Comparison, EvalReport
from saap.core.manifest import RunManifest
from saap.core.storage import TrailEntry, read_plan
from saap.reporting import model_figures as drawn
from saap.reporting.comparison import ratio_section
from saap.reporting.figures import Figure, words
from saap.reporting.importance import Agreement, GroupView, PlanGroup, agreement, plan_groups, read_views
from saap.reporting.page import Page, Section
from saap.reporting.sections import environment_section, evaluation_sections
from saap.reporting.tables import Table, number
from saap.settings.prune import FusionScope

ENOUGH = 200
"""Units of a role from which distributions of their scores say something."""


def model_page(
    folder: Path, manifest: RunManifest, reports: Sequence[EvalReport], comparison: Comparison | None
) -> Page:
    """The page of a folder that `saap prune` wrote. reports: of `saap eval`. comparison: baselines to show with it.

    Raises PlanError, StaleInputError or EvaluationError for a damaged folder.
    """
    plan_file, scores_file = (folder / "saap" / name for name in ("plan.json", "scores.safetensors"))
    plan = read_plan(plan_file)
    groups = plan_groups(plan, plan_file)
    scope = manifest.settings.get("fusion_scope", FusionScope.LAYER_ROLE)
    views = read_views(scores_file, groups, scope) if scores_file.is_file() else []
    commands = [manifest.command, *(report.command for report in reports)]
    sections = [
        _structure_section([group for group in groups.values() if group.layer >= 0], plan.dropped_blocks),
        *([_importance_section(views)] if views else []),
        *_search_sections(plan.trail),
        *([] if comparison is None else [ratio_section(comparison)]),
        *evaluation_sections(reports),
        *_recovery_sections(manifest),
        _stages_section(manifest),
        environment_section(commands, manifest.versions, manifest.settings),
    ]
    title = f"{folder.name}, pruned by saap"
    return Page(title=title, summary=words("model_summary", m=manifest), tiles=_tiles(manifest), sections=sections)


def _tiles(manifest: RunManifest) -> list[tuple[str, str]]:
    unit, size = ("MB", 1e6) if manifest.bytes.after >= 10**7 else ("kB", 1e3)
    seconds = sum(stage.seconds for stage in manifest.stages)
    found = manifest.perplexity
    ratio = [] if found is None else [(f"{found.after / found.before:.2f} x", "the dense model's perplexity")]
    return [
        (f"{manifest.parameters.after:,}", f"parameters, of {manifest.parameters.before:,}"),
        (f"{manifest.bytes.after / size:,.0f} {unit}", f"of weights, of {manifest.bytes.before / size:,.0f} {unit}"),
        *ratio,
        (f"{seconds:,.0f} s" if seconds < 300 else f"{seconds / 60:,.0f} min", "to make it"),
    ]


def _structure_section(groups: Sequence[PlanGroup], dropped: Sequence[int]) -> Section:
    by_role: dict[str, list[PlanGroup]] = {}
    for group in groups:
        by_role.setdefault(group.role, []).append(group)
    pruned = [role for role, same in by_role.items() if any(group.kept < group.of for group in same)]
    cells = {(group.layer, group.role): f"{group.kept} of {group.of}" for group in groups}
    layers = sorted({group.layer for group in groups})
    rows = [[str(layer), *(cells.get((layer, role), "") for role in by_role)] for layer in layers]
    return Section(
        name="structure",
        title="What is kept",
        paragraphs=[words("kept_structure", dropped=dropped, whole=[role for role in by_role if role not in pruned])],
        figures=[drawn.structure(by_role[role]) for role in pruned],
        tables=[("Kept units of each layer", (["layer", *by_role], rows))],
    )


def _importance_section(views: Sequence[GroupView]) -> Section:
    """What the scores of each role say, one module a layer."""
    by_role = {
        role: sorted({view.layer: view for view in views if view.role == role}.values(), key=lambda view: view.layer)
        for role in dict.fromkeys(view.role for view in views)
    }
    figures: list[Figure] = []
    if any(view.fluctuation.any() for view in views):
        found = {role: [agreement(view) for view in same] for role, same in by_role.items()}
        said = words("two_scores")
        means = [[role, _units(same), *_cells(found[role])] for role, same in by_role.items()]
        columns = list(next(iter(found.values()))[0])
        tables = [("Do the scores agree? Means over the layers", (["role", "units", *columns], means))]
        for role, same in by_role.items():
            if sum(len(view.fused) for view in same) >= ENOUGH:
                figures += drawn.importance_figures(same, found[role])
                table = ["layer", "kept", *columns], [_layer_row(*both) for both in zip(same, found[role], strict=True)]
                tables.append((f"{role} units, layer by layer", table))
    else:  # one score a unit, without a spread over the samples
        said, tables = words("one_score"), [("The scores", _score_table(by_role))]
    title = "Importance of every unit"
    return Section(name="importance", title=title, paragraphs=[said], figures=figures, tables=tables)


def _units(views: Sequence[GroupView]) -> str:
    return f"{sum(len(view.fused) for view in views):,}"


def _layer_row(view: GroupView, found: Agreement) -> list[str]:
    return [str(view.layer), f"{int(view.kept.sum()):,} of {len(view.kept):,}", *_cells([found])]


def _cells(found: Sequence[Agreement]) -> list[str]:
    """Means over modules of what is a number: a correlation, or a share of changed units."""
    cells = []
    for column in found[0]:
        known = [value for one in found if (value := one[column]) is not None and np.isfinite(value)]
        mean = float(np.mean(known)) if known else None
        is_share = mean is not None and column.startswith("fused, not")
        cells.append(f"{mean:.0%}" if is_share else number(mean, 2))
    return cells


def _score_table(by_role: Mapping[str, Sequence[GroupView]]) -> Table:
    rows = []
    for role, same in by_role.items():
        quantiles = np.percentile(np.concatenate([view.element for view in same]), (10, 50, 90))
        rows.append([role, _units(same), *(f"{value:.3g}" for value in quantiles)])
    return ["role", "units", "tenth", "median", "nine tenths"], rows


def _search_sections(trail: Sequence[TrailEntry]) -> list[Section]:
    measured = [(entry.name, entry.loss) for entry in trail if entry.loss is not None]
    title = "How the structure was found"
    if not measured:
        return []
    section = Section(name="search", title=title, paragraphs=[words("search")], figures=[drawn.trail(measured)])
    return [section]


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
        sections.append(Section(name="answer", title="One answer, stage by stage", answers=[(prompt, texts)]))
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
