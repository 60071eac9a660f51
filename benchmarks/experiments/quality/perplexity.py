"""Perplexity after pruning as a user would, on texts that nothing was calibrated on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.charts import bars, lines
from harness.experiment import Cells, Experiment, Measured, Request, Values
from harness.store import environment, read_json, write_json
from lab.commands import TEST, VALIDATION, peak_of, timed_saap
from lab.dense import multilingual_model
from lab.texts import INSTRUCTIONS, TOKENS, perplexities, texts

from experiments.method import selection
from experiments.quality import comparison
from saap.reporting.figures import Figure

ON_WIKITEXT2 = ["--calibration", VALIDATION]
RUNS: Mapping[str, list[str]] = {
    "fast-wikitext2": ["--pruning-ratio", "0.2", "--effort", "fast", *ON_WIKITEXT2],
    "default-wikitext2": ["--pruning-ratio", "0.2", *ON_WIKITEXT2],
    "best-wikitext2": ["--pruning-ratio", "0.2", "--effort", "best", *ON_WIKITEXT2],
    "fast-mixed": ["--pruning-ratio", "0.2", "--effort", "fast"],
    "default-mixed": ["--pruning-ratio", "0.2"],
    "default-wikitext2-10": ["--pruning-ratio", "0.1", *ON_WIKITEXT2],
    "default-wikitext2-30": ["--pruning-ratio", "0.3", *ON_WIKITEXT2],
    "default-wikitext2-50": ["--pruning-ratio", "0.5", *ON_WIKITEXT2],
    "default-wikitext2-uniform": ["--pruning-ratio", "0.2", "--layout", "uniform", *ON_WIKITEXT2],
}
FURTHER: Mapping[str, list[str]] = {
    "best-mixed": ["--pruning-ratio", "0.2", "--effort", "best"],
    "default-mixed-no-bos": ["--pruning-ratio", "0.2", "--no-bos"],
}
"""Runs that the page shows if they are there."""
GEMMA = "gemma-3-270m"
RATIO_RUNS = ("default-wikitext2-10", "default-wikitext2", "default-wikitext2-30", "default-wikitext2-50")


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    for cell in wanted:
        label, _, run = cell.rpartition("/")
        model = multilingual_model(request) if label else request.model
        with tempfile.TemporaryDirectory() as folder:
            yield cell, one_run(request, model, run, request.results / label, Path(folder))


def one_run(request: Request, model: str, run: str, results: Path, folder: Path) -> Values:
    """One `saap prune` in a process of its own, then perplexities; those of the dense model are kept in `results`."""
    flags, named = {**RUNS, **FURTHER}[run], texts(request.given, folder)
    bos = "--no-bos" not in flags
    report, seconds, _ = timed_saap("prune", model, *flags, "--out", folder / "pruned")
    dense_file = results / ("dense.json" if bos else "dense-no-bos.json")
    dense = read_json(dense_file) if dense_file.exists() else {}
    lacking = {name: file for name, file in named.items() if name not in dense}
    dense |= perplexities(model, lacking, bos=bos)
    write_json(dense_file, dense)
    pruned = perplexities(folder / "pruned", named, bos=bos)
    return {
        "command": " ".join(["saap", "prune", Path(model).name, *flags]),
        "seconds": round(seconds, 1),
        "load": round(os.getloadavg()[1], 1),
        "stages": {stage["name"]: round(stage["seconds"], 1) for stage in report["stages"]},
        "peak_resident_bytes": peak_of(report),
        "pruning_ratio": report["pruning_ratio"],
        "parameters": report["parameters"],
        "dtype": report["dtype"],
        "perplexity_dense": {name: dense[name] for name in pruned},
        "perplexity": pruned,
        "ratio": {name: value / dense[name] for name, value in pruned.items()},
        "trail": report["trail"],
        "environment": environment(),
    }


def summarise(cells: Cells) -> dict[str, Any]:
    runs = {
        name: {**run_summary(cells[name]), "ratio": {text: cells[name]["ratio"].get(text) for text in TOKENS}}
        for name in (*RUNS, *FURTHER)
        if name in cells
    }
    others = {name: cells[name] for name in cells if name.startswith(f"{GEMMA}/")}
    compared = [row for row in comparison.rows_of(cells) if row["ratio"] == 0.2]
    ours = {row["restored"]: row["ratios"][TEST] for row in compared if row["method"] == "saap"}
    best = {restored: comparison.best_baseline(compared, restored=restored) for restored in (False, True)}
    same = (row for row in compared if row["method"] != "saap" and not row["restored"])
    literal = [cell for name, cell in cells.items() if name.startswith("volatility")]
    return {
        "by_ratio": {name: runs[name] for name in RATIO_RUNS},
        "runs": runs,
        "others": others,
        "default": runs["default-wikitext2"],
        "mixed": runs["default-mixed"],
        "compared": [{**row, "ratio": row["ratios"][TEST]} for row in compared],
        "ours_restored": ours[True],
        "ours_cut": ours[False],
        "best_baseline_restored": best[True],
        "best_baseline_cut": best[False],
        "quotient_restored": ours[True] / best[True]["ratio"],
        "quotient_cut": ours[False] / best[False]["ratio"],
        # A baseline, cut only, that has our perplexity to the last digit is the same model.
        "same_plan": next((row["method"] for row in same if row["ratios"][TEST] == ours[False]), None),
        "literal_best_restored": min(cell["ratio_with_restoration"] for cell in literal),
    }


def run_summary(run: Values) -> dict[str, Any]:
    """Removed share, time and memory of a run; busy: the time says little, as the machine had other work."""
    cores = run["environment"]["cores"]
    busy = run.get("load", 0) > 1.5 * cores or int(run["environment"].get("threads", cores)) < cores
    return {
        "removed": run["pruning_ratio"], "seconds": None if busy else run["seconds"],
        "peak_resident_bytes": run["peak_resident_bytes"],
    }  # fmt: skip


def figures(summary: Values) -> Sequence[Figure]:
    runs = list(summary["by_ratio"].values())
    by_text = {
        text: ([100 * run["removed"] for run in runs], [run["ratio"][text] for run in runs])
        for text in TOKENS
        if all(run["ratio"][text] is not None for run in runs)
    }
    found = {(row["method"], row["restored"]): row["ratio"] for row in summary["compared"]}
    methods = list(dict.fromkeys(method for method, restored in found if (method, not restored) in found))
    return (
        lines(
            "perplexity-by-ratio", "Perplexity against what is removed",
            "Perplexity of the pruned over that of the dense model against the share that is removed, by text.",
            by_text, x="% of the decoder blocks removed", y="perplexity / dense", log="y",
        ),
        bars(
            "perplexity-by-method", "Methods at the same number of parameters",
            "Perplexity of the pruned over that of the dense model by method, of those measured cut only and restored.",
            {
                label: [found[method, restored] for method in methods]
                for label, restored in (("cut only", False), ("restored", True))
            },
            methods, x="perplexity / dense, WikiText-2 test",
        ),
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="perplexity", cells=lambda request: list(RUNS), measure=measure, summarise=summarise, figures=figures,
    options=INSTRUCTIONS, reads=(selection.EXPERIMENT, comparison.EXPERIMENT), own_files=True, smoke=False,
    extra=(*FURTHER, *(f"{GEMMA}/{run}" for run in ("default-mixed", "default-mixed-no-bos"))),
)  # fmt: skip
