"""The manifest and the report of one result."""

from __future__ import annotations

from dataclasses import asdict
from typing import NamedTuple

from saap.core.manifest import (
    Answers,
    BaseModelIdentity,
    Change,
    PerplexityChange,
    RunManifest,
    SpeedRecord,
    recorded_versions,
    typed_command,
)
from saap.core.records import ImportanceScores, Layout, StructurePlan
from saap.export.huggingface import modeling_code_digest
from saap.export.model_card import licence_of
from saap.pipeline.shared.context import Run
from saap.pipeline.shared.outcome import Behaviour


class Measured(NamedTuple):
    """What was measured of a result. speed: where one was requested."""

    dense: Behaviour
    pruned: Behaviour
    speed: SpeedRecord | None


def manifest_of_run(
    run: Run, plan: StructurePlan, scores: ImportanceScores, measured: Measured | None = None
) -> RunManifest:
    """The manifest of a result. measured: None before it was."""
    graph, tokens, itemsize, folder = run.graph, run.tokens, run.loaded.dtype.itemsize, run.loaded.folder
    digests = {
        "graph": graph.digest, "calibration": tokens.scored.digest, "scores": scores.digest, "plan": plan.digest,
    }  # fmt: skip
    if plan.layout is Layout.ADAPTIVE:
        digests["modeling_code"] = modeling_code_digest()
    manifest = RunManifest(
        base=BaseModelIdentity(**asdict(graph.model), licence=licence_of(folder) if folder is not None else None),
        command=typed_command(), settings=run.config.model_dump(mode="json"), seed=run.config.seed,
        layout=plan.layout, device=str(run.device), dtype=str(run.loaded.dtype).removeprefix("torch."),
        versions=recorded_versions(), digests=digests, stages=tuple(run.meter.stages),
        parameters=Change(before=graph.parameters, after=plan.parameters),
        block_parameters=Change(before=graph.block_parameters, after=plan.block_parameters),
        bytes=Change(before=graph.parameters * itemsize, after=plan.parameters * itemsize),
    )  # fmt: skip
    if measured is None:
        return manifest
    dense, pruned, speed = measured
    perplexity = PerplexityChange(
        text=tokens.evaluation_name, tokens=int(tokens.evaluation.size), before=dense.perplexity,
        after=pruned.perplexity,
    )  # fmt: skip
    answers = Answers(prompt=dense.prompt, dense=dense.answer, pruned=pruned.answer)
    return manifest.model_copy(update={"perplexity": perplexity, "answers": answers, "speed": speed})
