"""A requested speed-up: the budget that the search gets for it, and what was reached in the end."""

from __future__ import annotations

import torch
from torch import nn

from saap.core.manifest import SpeedRecord
from saap.core.records import ModelGraph, StructurePlan
from saap.evaluation.speed import speed_ups
from saap.pipeline.evaluate.speed import pair_of_speeds, weights_name
from saap.pipeline.prune.decode_costs import decode_costs, speed_settings, trial_speedup
from saap.pipeline.shared.context import Run
from saap.pipeline.shared.progress import Reporter
from saap.settings.prune import PruneConfig
from saap.structure_search.budget import TimeBudget, budget_for_speedup
from saap.structure_search.plan import SearchSpace, check_reachable

LARGEST_DEVIATION = 0.1
ROUNDS = 21
"""Of the two measurements that everything hangs on: longer than those of the table, since other work comes and goes."""


def budget_for_speed(
    model: nn.Module, graph: ModelGraph, space: SearchSpace, config: PruneConfig, reporter: Reporter
) -> TimeBudget:
    """The budget for the requested speed-up, from the measured costs of decoding.

    A plan of the requested speed, made without scores, is then measured itself: it shows that the runtime computes
    such a model, and corrects the costs by what they are off where modules of several roles shrink together.
    Raises TargetError for what cannot be reached, ModelError, ExportError for what the runtime cannot compute.
    """
    budget = budget_for_speedup(graph, decode_costs(model, graph, config, reporter), config.target_speedup or 1.0)
    plan = check_reachable(graph, budget, space)
    predicted, measured = budget.speedup(graph, plan), trial_speedup(model, graph, plan, speed_settings(config, ROUNDS))
    reporter.note(f"a plan of the speed {predicted:.3f} by the table has the speed {measured:.3f}")
    return budget.corrected(predicted=predicted, measured=measured)


def reached_speed(run: Run, budget: TimeBudget, plan: StructurePlan, pruned: nn.Module) -> SpeedRecord:
    """Speed of the result compared with the dense model, measured in turns."""
    settings = speed_settings(run.config, ROUNDS)
    fast, slow = pair_of_speeds(pruned, run.loaded.model, settings)
    return SpeedRecord(
        runtime=str(settings.runtime),
        weights=weights_name(pruned, settings),
        threads=torch.get_num_threads(),
        asked=run.config.target_speedup or 1.0,
        predicted=budget.speedup(run.graph, plan),
        reached=speed_ups(fast, slow)[1],
        dense_tokens_per_second=slow.decode,
        tokens_per_second=fast.decode,
    )


def diagnose_speed(speed: SpeedRecord | None) -> list[str]:
    """A sentence where the reached speed is not the requested one."""
    if speed is None or abs(speed.reached / speed.asked - 1) <= LARGEST_DEVIATION:
        return []
    return [
        f"the speed-up reached is {speed.reached:.2f}, not {speed.asked:g}: other work on this machine disturbs such "
        "measurements; run again when it is quiet, without the table in the cache folder"
    ]
