"""The page about a pruned model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from saap.core.evaluation_records import Comparison, EvalReport
from saap.core.manifest import KindChange, RunManifest, StageRecord, VocabularyRecord
from saap.core.storage import read_plan
from saap.reporting import model_figures as drawn
from saap.reporting.comparison_page import ratio_section
from saap.reporting.figures import Figure, words
from saap.reporting.importance import ModuleScores, PlanGroup, by_layer, plan_groups, read_modules
from saap.reporting.page import Page, Section
from saap.reporting.sections import environment_section, evaluation_sections
from saap.reporting.tables import number
from saap.settings.prune import FusionScope

ENOUGH = 200
"""Minimum number of units of a role for distributions of scores."""


def model_page(
    folder: Path, manifest: RunManifest, reports: Sequence[EvalReport], comparison: Comparison | None
) -> Page:
    """The page of a folder written by `saap prune`. reports: of `saap eval`. comparison: baselines to show with it.

    Raises PlanError, StaleInputError or EvaluationError for a damaged folder.
    """
    sections = [
        *([_kinds_section(manifest)] if manifest.kinds else []),
        *([] if manifest.vocabulary is None else [_vocabulary_section(manifest.vocabulary, manifest.kinds)]),
        *(_plan_sections(folder / "saap", manifest) if manifest.is_pruned else []),
        *([] if comparison is None else [ratio_section(comparison)]),
        *evaluation_sections(reports),
        *_recovery_sections(manifest),
        _stages_section(_stages(manifest)),
        environment_section(manifest, reports),
    ]
    title = f"{folder.resolve().name}, {'pruned' if manifest.is_pruned else 'tuned'} by saap"
    return Page(title=title, summary=words("model_summary", m=manifest), tiles=_tiles(manifest), sections=sections)


def _plan_sections(records: Path, manifest: RunManifest) -> list[Section]:
    """What is kept, by which scores, and how that was found. records: folder of the plan."""
    plan_file, scores_file = records / "plan.json", records / "scores.safetensors"
    plan = read_plan(plan_file)
    groups = plan_groups(plan, plan_file)
    scope = manifest.settings.get("fusion_scope", FusionScope.LAYER_ROLE)
    modules = read_modules(scores_file, groups, scope) if scores_file.is_file() else []
    measured = [(entry.name, entry.loss) for entry in plan.trail if entry.loss is not None]
    return [
        _structure_section(list(groups.values()), plan.dropped_blocks),
        *([_importance_section(modules)] if modules else []),
        *([_search_section(measured)] if measured else []),
    ]


def _stages(manifest: RunManifest) -> list[StageRecord]:
    """Of the pruning, and of the recovery."""
    return [*manifest.stages, *(() if manifest.recovery is None else manifest.recovery.stages)]


def _tiles(manifest: RunManifest) -> list[tuple[str, str]]:
    unit, size = ("MB", 1e6) if manifest.bytes.after >= 10**7 else ("kB", 1e3)
    seconds = sum(stage.seconds for stage in _stages(manifest))
    found = manifest.latest_perplexity
    ratio = [] if found is None else [(f"{found.ratio:.2f} x", "the dense model's perplexity")]
    return [
        (f"{manifest.parameters.after:,}", f"parameters, of {manifest.parameters.before:,}"),
        (f"{manifest.bytes.after / size:,.0f} {unit}", f"of weights, of {manifest.bytes.before / size:,.0f} {unit}"),
        *ratio,
        (f"{seconds:,.0f} s" if seconds < 300 else f"{seconds / 60:,.0f} min", "to make it"),
    ]


def _kinds_section(manifest: RunManifest) -> Section:
    """Perplexity of the dense and the pruned model by kind of text."""
    kinds, before = manifest.kinds, "" if manifest.recovery is None else ", before the recovery"
    rows = [[one.text, *(f"{value:.2f}" for value in (one.before, one.after, one.ratio))] for one in kinds]
    table = ("Perplexity by kind of text", (["kind of text", "dense", "pruned", "ratio"], rows))
    return Section(
        name="kinds", title=f"What is kept of each kind of text{before}", paragraphs=[words("by_kind")],
        figures=[drawn.kinds(kinds)], tables=[table],
    )  # fmt: skip


def _vocabulary_section(vocabulary: VocabularyRecord, kinds: Sequence[KindChange]) -> Section:
    """Tokens before and after by script, and what they cost in each kind of text."""
    rows = [[name, f"{one.before:,}", f"{one.after:,}"] for name, one in vocabulary.largest_scripts().items()]
    costs = [
        [
            one.text, number(one.bits_per_byte, 3), number(one.bits_per_byte_after, 3),
            *(f"{value:.2f}" for value in vocabulary.texts[one.text].bytes_per_token),
        ]
        for one in kinds if one.text in vocabulary.texts
    ]  # fmt: skip
    headings = ["kind of text", "bits per byte, dense", "pruned", "bytes per token, dense", "pruned"]
    tables = [("Tokens by script", (["script", "dense", "pruned"], rows)), ("By kind of text", (headings, costs))]
    said = words("kept_tokens", v=vocabulary)
    return Section(name="vocabulary", title="The vocabulary", paragraphs=[said], tables=tables)


def _structure_section(groups: Sequence[PlanGroup], dropped: Sequence[int]) -> Section:
    by_role: dict[str, list[PlanGroup]] = {}
    cells: defaultdict[int, dict[str, str]] = defaultdict(dict)
    for group in by_layer([group for group in groups if group.layer >= 0]):
        by_role.setdefault(group.role, []).append(group)
        cells[group.layer][group.role] = f"{group.kept} of {group.of}"
    pruned = [role for role, same in by_role.items() if any(group.kept < group.of for group in same)]
    rows = [[str(layer), *(one.get(role, "") for role in by_role)] for layer, one in sorted(cells.items())]
    shared = [group for group in groups if group.layer < 0 and group.kept < group.of]
    whole = [role for role in by_role if role not in pruned]
    return Section(
        name="structure",
        title="What is kept",
        paragraphs=[words("kept_structure", dropped=dropped, whole=whole, shared=shared)],
        figures=[drawn.structure(by_role[role]) for role in pruned],
        tables=[("Kept units of each layer", (["layer", *by_role], rows))],
    )


def _importance_section(modules: Sequence[ModuleScores]) -> Section:
    by_role = {
        role: sorted((one for one in modules if one.role == role), key=lambda one: one.layer)
        for role in dict.fromkeys(one.role for one in modules)
    }
    figures: list[Figure] = []
    units = {role: f"{sum(len(one.fused) for one in same):,}" for role, same in by_role.items()}
    if any(not np.array_equal(one.vector, one.element) for one in modules):
        said = words("two_scores")
        means = [[role, units[role], *_means(same)] for role, same in by_role.items()]
        columns = list(modules[0].agreement)
        tables = [("Do the scores agree? Means over the layers", (["role", "units", *columns], means))]
        for role, same in by_role.items():
            if sum(len(one.fused) for one in same) >= ENOUGH:
                figures += drawn.importance_figures(role, same)
                rows = [[str(one.layer), f"{one.kept.sum():,} of {len(one.kept):,}", *_means([one])] for one in same]
                tables.append((f"{role} units, layer by layer", (["layer", "kept", *columns], rows)))
    else:  # one score per unit, without variance over samples
        said, rows = words("one_score"), []
        for role, same in by_role.items():
            quantiles = np.percentile(np.concatenate([one.element for one in same]), (10, 50, 90))
            rows.append([role, units[role], *(f"{value:.3g}" for value in quantiles)])
        tables = [("The scores", (["role", "units", "tenth", "median", "nine tenths"], rows))]
    title = "Importance of every unit"
    return Section(name="importance", title=title, paragraphs=[said], figures=figures, tables=tables)


def _means(modules: Sequence[ModuleScores]) -> list[str]:
    """Means over modules of the finite values of a column: correlations, or shares of changed units."""
    cells = []
    for column in modules[0].agreement:
        known = [value for one in modules if (value := one.agreement[column]) is not None and np.isfinite(value)]
        mean = float(np.mean(known)) if known else None
        is_share = mean is not None and column.startswith("fused, not")
        cells.append(f"{mean:.0%}" if is_share else number(mean, 2))
    return cells


def _search_section(measured: Sequence[tuple[str, float]]) -> Section:
    figures, title = [drawn.trail(measured)], "How the structure was found"
    return Section(name="search", title=title, paragraphs=[words("search")], figures=figures)


def _recovery_sections(manifest: RunManifest) -> list[Section]:
    """The loss curve and the answers before and after, if the manifest has a recovery."""
    sections = []
    points = () if manifest.recovery is None else manifest.recovery.curve
    curves = {
        "training": [(point.step, point.loss) for point in points],
        "validation": [(point.step, point.validation) for point in points if point.validation is not None],
    }
    if points:
        figure = drawn.losses({label: curve for label, curve in curves.items() if curve})
        sections.append(Section(name="recovery", title="Recovery, step by step", figures=[figure]))
    answers = {} if manifest.answers is None else manifest.answers.model_dump()
    prompt = answers.pop("prompt", "")
    texts = tuple((name, text) for name, text in answers.items() if text)
    if texts:
        sections.append(Section(name="answer", title="One answer, stage by stage", answers=[(prompt, texts)]))
    return sections


def _stages_section(costs: Sequence[StageRecord]) -> Section:
    rows = [[cost.name, f"{cost.seconds:.1f}", f"{cost.peak_resident_bytes / 1e9:.2f}"] for cost in costs]
    tables = [("The same in numbers", (["stage", "seconds", "memory, GB"], rows))]
    figures = [drawn.stages(costs)] if costs else []
    return Section(name="stages", title="Time and memory", figures=figures, tables=tables, fold_tables=True)
