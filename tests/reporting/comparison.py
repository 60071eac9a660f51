"""A comparison as `saap compare` writes it, and the record of a recovery, made up."""

from __future__ import annotations

from typing import Any


def task(correct: list[int]) -> dict[str, Any]:
    acc = sum(correct) / len(correct)
    return {
        "acc": acc, "acc_stderr": 0.1, "acc_norm": acc, "acc_norm_stderr": 0.1, "chance": 0.25,
        "questions": len(correct), "source": "made up", "correct": correct, "correct_norm": correct,
    }  # fmt: skip


def row(method: str, ratio: float, value: float, *, seed: int = 0, restored: bool = False) -> dict[str, Any]:
    return {
        "method": method, "ratio": ratio, "seed": seed, "restored": restored, "pruning_ratio": ratio + 0.001,
        "parameters": round(1e6 * (1 - ratio)), "perplexity": {"a/b/text.txt": {"value": 20 * value, "tokens": 100}},
        "ratios": {"a/b/text.txt": value}, "tasks": {"arc_easy": task([1, 0, 1, 0])},
        "kept_accuracy": {"value": 0.5, "low": 0.25, "high": 0.75},
        "seconds": {"score": 1.0, "search": 2.0, "make": 3.0},
        "tokens_per_second": 100.0, "peak_resident_bytes": 2 * 10**9,
    }  # fmt: skip


def comparison() -> dict[str, Any]:
    rows = [
        row(method, ratio, 1 + ratio * factor + 0.1 * seed, seed=seed, restored=restored)
        for method, factor in (("saap", 2), ("flap", 4), ("llm_pruner & co", 8))
        for ratio in (0.1, 0.2)
        for seed in (0, 1)
        for restored in (False, True)
    ]
    dense = {
        "parameters": 10**6, "block_parameters": 9 * 10**5, "perplexity": {"a/b/text.txt": {"value": 20.0}},
        "tasks": {"arc_easy": task([1, 1, 1, 0])}, "tokens_per_second": 90.0,
    }  # fmt: skip
    return {"model": "made/up", "dense": dense, "rows": rows, "settings": {"samples": 50}, "versions": {"saap": "0"}}


def recovery_record() -> dict[str, Any]:
    point = {"tokens": 10, "rate": 0.1, "seconds": 1.0}
    return {
        "settings": {"bits": 4, "group_size": 32}, "data": ["text.txt"], "data_digest": "d", "examples": 9,
        "held_examples": 1, "processes": 1, "device": "cpu", "dtype": "float32", "versions": {"saap": "0"},
        "curve": [
            {**point, "step": 1, "loss": 3.0, "validation": 3.5}, {**point, "step": 2, "loss": 2.5, "validation": None},
        ],
        "validation_before": 3.6, "validation": 3.5, "best_step": 1, "tokens": 20, "seconds": 2.0,
        "stopped_by": "the limit of 2 steps", "evaluation": "a text", "evaluation_tokens": 100,
        "perplexity": {"dense": 20.0, "before": 25.0, "recovered": 22.0},
    }  # fmt: skip
