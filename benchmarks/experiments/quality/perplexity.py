"""Perplexity after pruning with the command line, on texts not used for calibration."""

import os
import tempfile
from pathlib import Path

from harness.charts import bars, lines
from harness.experiment import Cells, Figures, Measured, Names, Request, Values
from harness.store import environment, read_json, write_json
from lab.commands import TEST, VALIDATION, peak_of, timed_saap
from lab.dense import multilingual_model
from lab.texts import INSTRUCTIONS, TOKENS, perplexities, texts

from experiments.quality import comparison

RUNS = {
    "fast-wikitext2": ["0.2", "--effort", "fast"],
    "default-wikitext2": ["0.2"],
    "best-wikitext2": ["0.2", "--effort", "best"],
    "fast-mixed": ["0.2", "--effort", "fast"],
    "default-mixed": ["0.2"],
    "default-wikitext2-10": ["0.1"],
    "default-wikitext2-30": ["0.3"],
    "default-wikitext2-50": ["0.5"],
    "default-wikitext2-uniform": ["0.2", "--layout", "uniform"],
}
"""Pruning ratio and further flags; calibrated on WikiText-2 or on the default text, `mixed`."""
FURTHER = {"best-mixed": ["0.2", "--effort", "best"], "default-mixed-no-bos": ["0.2", "--no-bos"]}
"""Optional runs, shown if measured."""
GEMMA = "gemma-3-270m"
RATIO_RUNS = ("default-wikitext2-10", "default-wikitext2", "default-wikitext2-30", "default-wikitext2-50")
CELLS = list(RUNS)
OPTIONS = INSTRUCTIONS
READS = ("method.selection", "quality.comparison")
EXTRA = (*FURTHER, *(f"{GEMMA}/{run}" for run in ("default-mixed", "default-mixed-no-bos")))
OWN_FILES = True
SMOKE = False


def measure(request: Request, wanted: Names) -> Measured:
    """One `saap prune` per cell in a separate process, then perplexities; those of the dense model are cached."""
    for cell in wanted:
        label, _, run = cell.rpartition("/")
        model = multilingual_model(request) if label else request.model
        text = ["--calibration", VALIDATION] if "wikitext2" in run else []
        chosen = ["--pruning-ratio", *(RUNS | FURTHER)[run], *text]
        bos = "--no-bos" not in chosen
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            named = texts(request.given, folder)
            report, seconds, _ = timed_saap("prune", model, *chosen, "--out", folder / "pruned")
            dense_file = request.results / label / ("dense.json" if bos else "dense-no-bos.json")
            dense = read_json(dense_file) if dense_file.exists() else {}
            dense |= perplexities(model, {n: file for n, file in named.items() if n not in dense}, bos=bos)
            write_json(dense_file, dense)
            pruned = perplexities(folder / "pruned", named, bos=bos)
        yield cell, {
            "command": " ".join(["saap", "prune", Path(model).name, *chosen]),
            "seconds": round(seconds, 1), "load": round(os.getloadavg()[1], 1),
            "stages": {stage["name"]: round(stage["seconds"], 1) for stage in report["stages"]},
            "peak_resident_bytes": peak_of(report), "environment": environment(),
            **{name: report[name] for name in ("pruning_ratio", "parameters", "dtype", "trail")},
            "perplexity_dense": {name: dense[name] for name in pruned}, "perplexity": pruned,
            "ratio": {name: value / dense[name] for name, value in pruned.items()},
        }  # fmt: skip


def summarise(cells: Cells) -> Values:
    runs = {name: run_summary(cells[name]) for name in (*RUNS, *FURTHER) if name in cells}
    compared = [row for row in comparison.rows_of(cells) if row["ratio"] == 0.2]
    ours = {row["restored"]: row["ratios"][TEST] for row in compared if row["method"] == "saap"}
    best = {restored: comparison.best_baseline(compared, restored=restored) for restored in (False, True)}
    same = (row for row in compared if row["method"] != "saap" and not row["restored"])
    literal = [cell["ratio_with_restoration"] for name, cell in cells.items() if name.startswith("volatility")]
    return {
        "runs": runs, "default": runs["default-wikitext2"], "mixed": runs["default-mixed"],
        "others": {name: cell for name, cell in cells.items() if name.startswith(f"{GEMMA}/")},
        "compared": compared, "ours_restored": ours[True], "ours_cut": ours[False],
        "best_baseline_restored": best[True], "best_baseline_cut": best[False],
        # A cut-only baseline with exactly our perplexity is the same model.
        "same_plan": next((row["method"] for row in same if row["ratios"][TEST] == ours[False]), None),
        "literal_best_restored": min(literal),
    }  # fmt: skip


def run_summary(run: Values) -> Values:
    """Ratios, pruned share, time and memory of a run; the time depends on other load of the machine."""
    cores = run["environment"]["cores"]
    busy = run.get("load", 0) > 1.5 * cores or int(run["environment"].get("threads", cores)) < cores
    return {
        "removed": run["pruning_ratio"], "seconds": None if busy else run["seconds"],
        "peak_resident_bytes": run["peak_resident_bytes"], "ratio": {text: run["ratio"].get(text) for text in TOKENS},
    }  # fmt: skip


def figures(summary: Values) -> Figures:
    runs = [summary["runs"][name] for name in RATIO_RUNS]
    measured = [text for text in TOKENS if all(run["ratio"][text] is not None for run in runs)]
    removed = [100 * run["removed"] for run in runs]
    states = {"cut only": False, "restored": True}
    found = {(row["method"], row["restored"]): row["ratios"][TEST] for row in summary["compared"]}
    methods = list(dict.fromkeys(method for method, restored in found if (method, not restored) in found))
    series = {text: (removed, [run["ratio"][text] for run in runs]) for text in measured}
    values = {label: [found[method, restored] for method in methods] for label, restored in states.items()}
    return [
        lines("perplexity-by-ratio", series, x="% of the decoder blocks removed", y="perplexity / dense", log="y"),
        bars("perplexity-by-method", values, methods, x="perplexity / dense, WikiText-2 test"),
    ]
