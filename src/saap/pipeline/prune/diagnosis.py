"""What looks wrong with a result, and what to do about it: one sentence each."""

from __future__ import annotations

import math

import numpy as np

from saap.core.records import FloatArray, ImportanceScores
from saap.pipeline.prune.making import Made
from saap.pipeline.prune.records import Measured
from saap.pipeline.shared.context import Run

LARGEST_DEVIATION = 0.1
"""Of the reached speed-up from the requested one."""


def findings_of(run: Run, made: Made, scores: ImportanceScores, measured: Measured) -> list[str]:
    """Signs that scores, search, reconstruction, speed or memory were not as they should be."""
    return [*_importance(scores), *_search(made), *_quality(run, made, measured), *_cost(run, measured)]


def _importance(scores: ImportanceScores) -> list[str]:
    """Units without any signal, or an order that few samples would change."""
    findings = []
    silent = sum(int((group.element == 0).sum()) for group in scores.groups.values())
    units = sum(len(group.element) for group in scores.groups.values())
    if units and silent > 0.05 * units:
        findings.append(
            f"{silent / units:.0%} of the units have importance 0: the calibration text never uses them; "
            "calibrate on more or more varied text (--calibration, --num-samples)."
        )
    errors = [_relative_error(group.element, group.element_m2, scores.samples) for group in scores.groups.values()]
    if errors and float(np.median(errors)) > 0.5:
        findings.append(
            "the importance scores are noisy: their error over samples exceeds half of their spread over units; "
            f"use more samples than {scores.samples} (--num-samples)."
        )
    return findings


def _relative_error(mean: FloatArray, m2: FloatArray, samples: int) -> float:
    """Median standard error of a unit's mean over the spread of the means inside the module."""
    error = float(np.median(np.sqrt(np.maximum(m2, 0) / max(samples - 1, 1) / samples)))
    spread = float(mean.std())
    return error / spread if spread > 0 else 0.0


def _search(made: Made) -> list[str]:
    if made.plan.trail and made.plan.trail[0].loss > 2.0:
        return [
            f"the best structure found is {made.plan.trail[0].loss:.1f} nats per token away from the dense model "
            "before reconstruction: prune less, or allow more roles and layers."
        ]
    return []


def _quality(run: Run, made: Made, measured: Measured) -> list[str]:
    """A perplexity that grew beyond what the removed share explains, or a reconstruction that failed."""
    findings = []
    removed = 1 - made.plan.block_parameters / run.graph.block_parameters
    growth = measured.pruned.perplexity / measured.dense.perplexity
    if not math.isfinite(growth):
        findings.append(
            "the pruned model's perplexity is not finite: prune less, or compute in float32 (--dtype float32)."
        )
    elif growth > 1 + 10 * removed:
        more = "use --effort best or more refit text (--refit-tokens)"
        findings.append(
            f"perplexity grew {growth:.1f} times for {removed:.0%} removed, more than usual: the importance scores may "
            f"not fit this model; {more if run.config.restore else 'leave out --no-restore'}, or another --strategy."
        )
    useless, every = sum(error >= 1.0 for error in made.refit_errors.values()), len(made.refit_errors)
    if useless > every / 2:
        findings.append(
            f"reconstruction helped in only {every - useless} of {every} modules: "
            "the refit text is too short or too uniform (--refit-tokens, --calibration)."
        )
    return findings


def _cost(run: Run, measured: Measured) -> list[str]:
    """A speed that is not the requested one, and stages that needed many times the weights."""
    speed, weights = measured.speed, run.graph.parameters * run.loaded.dtype.itemsize
    findings = []
    if speed is not None and abs(speed.reached / speed.asked - 1) > LARGEST_DEVIATION:
        findings.append(
            f"the speed-up reached is {speed.reached:.2f}, not {speed.asked:g}: other work on this machine disturbs "
            "such measurements; run again when it is quiet, without the table in the cache folder"
        )
    return findings + [
        f"stage {stage.name!r} used {stage.peak_resident_bytes / 1e9:.1f} GB, over 12 times the weights: "
        "lower --refit-tokens or --num-samples."
        for stage in run.meter.stages
        if stage.peak_resident_bytes > 12 * weights + 4 * 10**9
    ]
