"""The experiments, in the order of their pages."""

from harness.experiment import experiment

MODULES = (
    "quality.models", "quality.comparison", "quality.zero_shot", "quality.baselines",
    "method.selection", "method.importance", "method.break_conditions", "method.ablation",
    "method.allocation", "method.calibration", "quality.families", "quality.experts",
    "quality.vocabulary", "quality.multilingual", "quality.multimodal", "quality.recovery", "method.teacher_logits",
    "quality.group_sizes", "quality.vllm", "method.overlap",
    "cost.estimation_cost", "cost.training_cost", "cost.cost", "cost.shapes", "cost.expert_shapes", "cost.speed",
    "cost.vllm_speed", "cost.processes", "cost.accelerator", "cost.device_limit", "cost.forecast",
    "cost.hardware", "cost.gguf_files", "quality.mlx", "cost.gguf_types",
)  # fmt: skip

EXPERIMENTS = [experiment(name) for name in MODULES]
