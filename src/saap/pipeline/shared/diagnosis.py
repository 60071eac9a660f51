"""What looks wrong with a result, and what to do about it: one sentence each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from saap.core.manifest import StageRecord
from saap.core.records import Candidate, FloatArray, ImportanceScores, ModelGraph, StructurePlan


def diagnose_importance(scores: ImportanceScores) -> list[str]:
    """Signs that the scores cannot be trusted: units without any signal, or an order that few samples would change."""
    findings = []
    silent = sum(int((group.element == 0).sum()) for group in scores.groups.values())
    units = sum(len(group.element) for group in scores.groups.values())
    if units and silent > 0.05 * units:
        findings.append(
            f"{silent / units:.0%} of the units have importance 0: the calibration text never uses them; "
            "calibrate on more or more varied text (--calibration, --num-samples)."
        )
    unstable = [
        _split_disagreement(group.element, group.element_m2, scores.samples) for group in scores.groups.values()
    ]
    if unstable and float(np.median(unstable)) > 0.5:
        findings.append(
            "the importance scores are noisy: their error over samples exceeds half of their spread over units; "
            f"use more samples than {scores.samples} (--num-samples)."
        )
    return findings


def _split_disagreement(mean: FloatArray, m2: FloatArray, samples: int) -> float:
    """Median standard error of a unit's mean over the spread of the means inside the module."""
    error = float(np.median(np.sqrt(np.maximum(m2, 0) / max(samples - 1, 1) / samples)))
    spread = float(mean.std())
    return error / spread if spread > 0 else 0.0


def diagnose_result(
    graph: ModelGraph,
    plan: StructurePlan,
    perplexity_ratio: float,
    refit_errors: Mapping[str, float],
    restored: bool,
) -> list[str]:
    """Signs of a bad result: a perplexity that grew beyond what the removed share explains, or a refit that failed."""
    findings = []
    ratio = 1 - plan.block_parameters / graph.block_parameters
    if not math.isfinite(perplexity_ratio):
        findings.append(
            "the pruned model's perplexity is not finite: prune less, or compute in float32 (--dtype float32)."
        )
    elif perplexity_ratio > 1 + 10 * ratio:
        remedy = "use --effort best or more refit text (--refit-tokens)" if restored else "leave out --no-restore"
        findings.append(
            f"perplexity grew {perplexity_ratio:.1f} times for {ratio:.0%} removed, more than usual: the importance "
            f"scores may not fit this model; {remedy}, or another --strategy."
        )
    useless = [path for path, error in refit_errors.items() if error >= 1.0]
    if refit_errors and len(useless) > len(refit_errors) / 2:
        findings.append(
            f"restoration helped in only {len(refit_errors) - len(useless)} of {len(refit_errors)} modules: "
            "the refit text is too short or too uniform (--refit-tokens, --calibration)."
        )
    return findings


def diagnose_search(trail: Sequence[Candidate]) -> list[str]:
    """Signs that the search had no good candidate."""
    if trail and trail[0].loss > 2.0:
        return [
            f"the best structure found is {trail[0].loss:.1f} nats per token away from the dense model before "
            "restoration: prune less, or allow more roles and layers."
        ]
    return []


def diagnose_memory(stages: Sequence[StageRecord], weights_bytes: int) -> list[str]:
    """Signs of a memory problem: a stage that needed many times the weights."""
    heavy = [stage for stage in stages if stage.peak_resident_bytes > 12 * weights_bytes + 4 * 10**9]
    return [
        f"stage {stage.name!r} used {stage.peak_resident_bytes / 1e9:.1f} GB, over 12 times the weights: "
        "lower --refit-tokens or --num-samples."
        for stage in heavy
    ]
