"""The page about a pruned model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from saap.config import FusionScope
from saap.errors import EvaluationError
from saap.estimation.fusion import closed_form_sigma, fused
from saap.export.manifest import RunManifest
from saap.pipeline.report_comparison import ratio_section
from saap.pipeline.report_parts import environment_section, evaluation_sections, read_json
from saap.records import ImportanceScores
from saap.reporting import model_figures as drawn
from saap.reporting.figures import Figure
from saap.reporting.importance import Agreement, GroupView, agreement, by_layer, mean_known
from saap.reporting.page import Page, Section
from saap.reporting.tables import number
from saap.storage import parse_units, read_scores

ENOUGH = 200
"""Units of a role from which distributions of their scores say something."""


def model_page(folder: Path, reports: Sequence[dict[str, Any]], comparison: Mapping[str, Any] | None) -> Page:
    """The page of a folder that `saap prune` wrote. reports: of `saap eval`. comparison: baselines to show beside it.

    Raises EvaluationError for a damaged folder.
    """
    manifest = _manifest(folder / "saap" / "manifest.json")
    plan = read_json(folder / "saap" / "plan.json", "a plan")
    scores_file = folder / "saap" / "scores.safetensors"
    views = _views(read_scores(scores_file), plan, manifest) if scores_file.is_file() else []
    found = manifest.perplexity
    sections = [
        _structure_section(plan),
        *([_importance_section(views)] if views else []),
        *([_search_section(plan)] if plan.get("trail") else []),
        *([] if comparison is None else [ratio_section(comparison)]),
        *evaluation_sections(reports),
        *_recovery_sections(folder),
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
    whole = [role for role in roles if all(row["kept"] == row["of"] for row in rows if row["role"] == role)]
    dropped = plan.get("dropped_blocks") or ()
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


def _search_section(plan: Mapping[str, Any]) -> Section:
    return Section(
        name="search",
        title="How the structure was found",
        paragraphs=("Each candidate was tried by masking, before anything was cut, on text kept apart for this.",),
        figures=(drawn.trail(plan["trail"]),),
    )


def _recovery_sections(folder: Path) -> list[Section]:
    """The loss curve and the answers before and after, where a recovery left them in the manifest."""
    record = read_json(folder / "saap" / "manifest.json", "a manifest")
    sections = []
    curves: dict[str, list[tuple[float, float]]] = {}
    for point in (record.get("recovery") or {}).get("curve") or ():
        for name, label in (("loss", "training"), ("validation", "validation")):
            if point.get(name) is not None:
                curves.setdefault(label, []).append((float(point["step"]), float(point[name])))
    if curves:
        sections.append(Section(name="recovery", title="Recovery, step by step", figures=(drawn.losses(curves),)))
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
        figures=(drawn.stages(costs),) if costs else (),
        tables=(("The same in numbers", (["stage", "seconds", "memory, GB"], rows)),),
        fold_tables=True,
    )
