"""The experiments, in the order in which their pages are read."""

from __future__ import annotations

from harness.experiment import Experiment

from experiments.cost import (
    accelerator,
    cost,
    estimation_cost,
    faults,
    forecast,
    gguf_files,
    processes,
    recipes,
    report_page,
    shapes,
    speed,
)
from experiments.method import ablation, boundaries, break_conditions, calibration, importance, influence, selection
from experiments.quality import (
    baselines,
    comparison,
    families,
    generation,
    group_sizes,
    multilingual,
    multimodal,
    other_models,
    perplexity,
    recovery,
)

MODULES = (
    perplexity, comparison, baselines, influence, other_models, selection, importance, break_conditions, ablation,
    calibration, families, multilingual, multimodal, recovery, group_sizes, boundaries, generation, estimation_cost,
    cost, shapes, speed, processes, accelerator, forecast, faults, recipes, gguf_files, report_page,
)  # fmt: skip

EXPERIMENTS: list[Experiment] = [module.EXPERIMENT for module in MODULES]
