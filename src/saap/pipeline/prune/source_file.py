"""Removal of whole experts from the model's own files: a GGUF file, or a folder of quantised safetensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Union

from torch import nn

from saap.core.errors import ConfigurationError, ExportError, PlanError, TargetError, listed
from saap.core.manifest import Change, RunManifest
from saap.core.records import CoupledGroup, ImportanceScores, Layout, ModelGraph, Role, StructurePlan
from saap.core.storage import PlanDocument, write_plan, write_scores, write_whole
from saap.export.expert_folder import FolderExperts, open_expert_folder
from saap.export.placing import whole_folder
from saap.models.loading.references import PACKAGED_MODELS, resolve_model
from saap.pipeline.shared.context import Run
from saap.pipeline.shared.inputs import LoadedModel, RunOptions
from saap.pipeline.shared.targets import is_file, records_of
from saap.settings.prune import PrunableRole, PruneConfig
from saap.settings.registry import Strategy
from saap.structure_search.budget import Budget

if TYPE_CHECKING:
    from saap.export.gguf.removal import GgufExperts

Experts = Union["GgufExperts", FolderExperts]
RULE = "every layer keeps the same number of experts, since a GGUF file has one number for all of them"


def for_source_file(
    source: str | Path | nn.Module, config: PruneConfig, options: RunOptions
) -> tuple[PruneConfig, GgufExperts | None]:
    """The configuration and the source's experts, if the result is to be a GGUF file; else the given configuration.

    Nothing is reconstructed then, and the layout is uniform. Raises ConfigurationError for settings that such a file
    has no place for, ModelError or ExportError for a source without experts that can be removed.
    """
    if options.out is None or not is_file(options.out):
        return config, None
    out, given, folder = options.out, config.model_fields_set, "write a folder with -o DIR"
    from_gguf = not isinstance(source, nn.Module) and (is_file(Path(source)) or str(source) in PACKAGED_MODELS)
    tokens = [PrunableRole.VOCABULARY] if config.prunes_vocabulary else []
    other_roles = " and ".join(dict.fromkeys(one for one in [*config.roles, *tokens] if one is not PrunableRole.EXPERT))
    kept = f"but in {out} the weights that stay are those of MODEL, unchanged"
    faults = (
        (
            not from_gguf, f"-o {out} needs a GGUF file as MODEL",
            "Write a folder with -o DIR, and then use `saap export DIR --format gguf`",
        ), (
            bool(other_roles), f"Only whole experts can be removed from a GGUF file, not {other_roles}",
            f"Use --roles expert, or {folder}",
        ),
        ("restore" in given and config.restore, f"--restore changes weights, {kept}", f"Leave it out, or {folder}"),
        (
            config.strategy is Strategy.SECOND_ORDER, f"--strategy second-order counts on a reconstruction, {kept}",
            f"Leave it out, or {folder}",
        ),
        (config.merge_experts, f"--merge-experts changes weights, {kept}", f"Leave it out, or {folder}"),
        (options.dtype != "auto", f"--dtype changes weights, {kept}", f"Leave it out, or {folder}"),
        *(
            (name in given and value, f"{flag} lets layers differ, but {RULE}", f"Leave it out, or {folder}")
            for name, flag, value in (
                ("layout", "--layout adaptive", config.layout is Layout.ADAPTIVE),
                ("skip_layers", "--skip-layers", config.skip_layers is not None),
            )
        ),
    )  # fmt: skip
    for holds, problem, remedy in faults:
        if holds:
            raise ConfigurationError(problem, remedy)
    path = resolve_model(str(source)).path  # also checks that the package gguf is installed
    from saap.export.gguf.removal import open_experts

    experts = open_experts(path)
    set_ones = {name: getattr(config, name) for name in given}
    return PruneConfig(**{**set_ones, "restore": False, "layout": Layout.UNIFORM}), experts


def check_layers(experts: GgufExperts, graph: ModelGraph) -> None:
    """Raise ConfigurationError unless all experts of the file can be removed."""
    units = _of_layers(graph, lambda group: range(group.units))
    missing = [str(layer) for layer in experts.layers if len(units.get(layer, ())) != experts.count]
    if missing:
        reasons = [refusal.reason for refusal in graph.refused if str(Role.EXPERT) in refusal.name]
        why = f" ({reasons[0]})" if reasons else ""
        raise ConfigurationError(
            f"The experts of the layers {listed(missing, 8)} of {experts.path.name} cannot be removed{why}",
            "Use another model",
        )


def check_plan(experts: Experts, graph: ModelGraph, given: PlanDocument) -> None:
    """Raise PlanError or ExportError unless a given plan removes only experts, as many from every layer."""
    keep = {name: kept if isinstance(kept, int) else len(kept) for name, kept in given.keep(graph).items()}
    others = [g.name for g in graph.groups if g.role is not Role.EXPERT and keep.get(g.name, g.units) < g.units]
    if others or given.dropped_blocks:
        what = listed([*others, *(f"block {layer}" for layer in given.dropped_blocks)], 4)
        problem = f"Only whole experts can be removed from the model's own files, but the plan removes parts of {what}"
        raise PlanError(problem, "Write a folder with -o DIR and --restore")
    kept = _of_layers(graph, lambda group: range(keep.get(group.name, group.units)))
    sizes = sorted({len(numbers) for numbers in kept.values()})
    if len(sizes) > 1:
        place, other = "A GGUF file", "write a folder"
        if isinstance(experts, FolderExperts):
            place, other = "config.json", "use --layout adaptive"
        problem = f"{place} has one number of experts for all layers, but {sizes[0]} to {sizes[-1]} are kept"
        raise ExportError(problem, f"Keep equally many, or {other}")


def file_budget(experts: Experts, graph: ModelGraph, target: int) -> Budget:
    """Budget so that the tensors in the files take at most `target` bytes. Raises TargetError."""
    groups = graph.of_role(Role.EXPERT)
    each = min(group.units for group in groups)

    def size(count: int) -> int:
        return experts.nbytes(_of_layers(graph, lambda group: range(count)))

    sizes = [size(count) for count in range(1, each + 1)]
    low, high, kept = sizes[0], sizes[-1], sum(size <= target for size in sizes)
    if not low <= target <= high:
        raise TargetError(
            f"target of {target:,} bytes is out of range for tensors of {high:,} bytes",
            f"Give a size from {low:,} to {high:,} bytes",
        )
    units = sum(group.parameters_per_unit(graph.shapes) for group in groups)
    return Budget(removal=units * (each - kept))


def folder_experts(
    loaded: LoadedModel, graph: ModelGraph, config: PruneConfig, options: RunOptions
) -> FolderExperts | None:
    """The experts of a folder of quantised safetensors, if the result is that folder without some of them; else None.

    It is if only whole experts are removed, all layers keep as many, nothing is reconstructed, and no type of weights
    was specified. Raises ExportError.
    """
    changed = config.restore or config.layout is not Layout.UNIFORM or set(config.roles) != {PrunableRole.EXPERT}
    written = options.out is not None and options.dtype == "auto"
    if loaded.folder is None or loaded.quantisation is None or changed or not written or not graph.of_role(Role.EXPERT):
        return None
    return open_expert_folder(loaded.folder, loaded.quantisation, graph, loaded.model.config)


def notes(loaded: LoadedModel, experts: Experts | None) -> Iterator[str]:
    """What the user is told of the format of the result."""
    if isinstance(experts, FolderExperts):
        yield f"the weights that stay are written as MODEL has them ({experts.type})"
        if experts.left_out:
            yield "its layers for multi-token prediction are left out, since their experts cannot be scored"
    elif experts is not None:
        yield RULE
    elif loaded.quantisation is not None:
        dtype = str(loaded.dtype).removeprefix("torch.")
        yield (
            f"the result is written in {dtype}; with --roles expert --layout uniform --no-restore it stays "
            f"{loaded.quantisation}"
        )


def source_bytes(experts: Experts, graph: ModelGraph) -> int:
    """Bytes of all tensors of the source that the model reads."""
    return experts.nbytes(_of_layers(graph, lambda group: range(group.units)))


def stored_bytes(experts: Experts, graph: ModelGraph, plan: StructurePlan) -> Change:
    """Bytes of the tensors before and after."""
    return Change(before=source_bytes(experts, graph), after=experts.nbytes(_of_layers(graph, plan.kept)))


def _of_layers(graph: ModelGraph, kept: Callable[[CoupledGroup], Sequence[int]]) -> Mapping[int, Sequence[int]]:
    """Numbers of experts of each layer, over all groups that its router chooses among. kept: of one group."""
    found: dict[int, list[int]] = {}
    for group in graph.of_role(Role.EXPERT):
        numbers = found.setdefault(group.layer, [])
        numbers += [group.members[0].offset + unit for unit in kept(group)]
    return {layer: sorted(numbers) for layer, numbers in found.items()}


def write_source_file(
    run: Run, experts: Experts, made: Path, plan: StructurePlan, scores: ImportanceScores | None
) -> None:
    """Write the model's files without the removed experts at `made`, with plan and scores among its records."""
    keep = _of_layers(run.graph, plan.kept)
    if not isinstance(experts, FolderExperts):
        _write_records(records_of(made), run, plan, scores)
        experts.write(made, keep, run.meter.reporter.advance)
        return
    with whole_folder(made) as folder:
        experts.write(folder, keep)
        _write_records(records_of(folder), run, plan, scores)


def _write_records(records: Path, run: Run, plan: StructurePlan, scores: ImportanceScores | None) -> None:
    records.mkdir(parents=True, exist_ok=True)
    write_plan(records / "plan.json", plan, run.graph)
    if scores is not None:
        write_scores(records / "scores.safetensors", scores)


def write_manifest(path: Path, manifest: RunManifest) -> None:
    """Write the manifest into the records of a file."""
    write_whole(records_of(path) / "manifest.json", (manifest.model_dump_json(indent=2) + "\n").encode())
