"""What pruning costs on each kind of text, on four real models and with each preset, without naming a calibration."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path

from harness.digests import MAKING
from harness.experiment import Cells, Measured, Names, Request, Values
from lab.commands import VALIDATION, peak_of, timed_saap
from lab.dense import source_of
from lab.texts import DATA, INSTRUCTIONS, perplexities, texts

SMOLLM2, GEMMA, QWEN, LARGE = "smollm2", "gemma-3-270m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"
RUNS = {
    "fast": ["--preset", "fast"],
    "default": [],
    "best": ["--preset", "best"],
    "paper": ["--preset", "paper"],
    "wikitext2": ["--calibration", VALIDATION],
    "llm-pruner": ["--method", "llm-pruner-element2", "--roles", "ffn"],
    "llm-pruner-restored": ["--method", "llm-pruner-element2", "--roles", "ffn", "--restore", "--preset", "fast"],
}
"""paper tunes on the bundled instructions for 20 minutes; the others train for their short distillation alone.

wikitext2: the default on text of the kind that most papers calibrate on and measure.
"""
OF_SMOLLM2 = ("best", "paper", "wikitext2")
CELLS = [
    *(f"{SMOLLM2}/{run}" for run in RUNS),
    *(f"{GEMMA}/{run}" for run in RUNS if run not in OF_SMOLLM2),
    *(f"{QWEN}/{run}" for run in RUNS if run not in OF_SMOLLM2),
    *(f"{LARGE}/{run}" for run in ("fast", "llm-pruner", "llm-pruner-restored")),
]
MORE = {"french": DATA / "flores200" / "fra.evaluation.txt.gz", "chinese": DATA / "flores200" / "zho.evaluation.txt.gz"}
CODE = ("rich.layout", "jinja2.loaders", "networkx.algorithms.bipartite.matching", "sklearn.cluster._kmeans")
"""Installed modules whose sources nothing was calibrated on."""
OPTIONS = INSTRUCTIONS
SETTINGS = {"pruning ratio": 0.2, "measured tokens": 4096}
SMOKE = False
PARTIAL = True
DECIDED_BY = (*MAKING, "baselines")


def code(folder: Path) -> Path:
    """Python code in one file."""
    sources = [Path(found.origin) for found in map(find_spec, CODE) if found is not None and found.origin]
    file = folder / "code.txt"
    file.write_text("\n\n".join(source.read_text(encoding="utf-8")[500:9500] for source in sources), encoding="utf-8")
    return file


def measure(request: Request, wanted: Names) -> Measured:
    """One `saap prune` each in a process of its own; what it says of each kind, and perplexities of further texts."""
    ratio, most = str(request.settings["pruning ratio"]), int(request.settings["measured tokens"])
    for cell in wanted:
        model, _, run = cell.partition("/")
        source = source_of(request, model)
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / "pruned"
            named = {**texts(request.given, Path(temporary)), **MORE, "code": code(Path(temporary))}
            report, seconds, processor = timed_saap("prune", source, "--pruning-ratio", ratio, *RUNS[run], "--out", out)
            report = report.get("pruned", report)
            dense, pruned = (perplexities(one, named, most=most) for one in (source, out))
        yield cell, {
            "command": " ".join(["saap", "prune", model, "--pruning-ratio", ratio, *RUNS[run]]),
            "seconds": round(seconds, 1), "processor_seconds": round(processor, 1),
            "stages": {stage["name"]: round(stage["seconds"], 1) for stage in report["stages"]},
            "peak_resident_bytes": peak_of(report),
            "bundled": report["perplexity"] / report["perplexity_dense"],
            "kinds": {one["text"]: one["after"] / one["before"] for one in report["kinds"]},
            "ratio": {name: value / dense[name] for name, value in pruned.items()},
            "trail": report["trail"],
            "distillation": report["distillation"],
        }  # fmt: skip


def minutes(found: Values) -> float | None:
    """Minutes of the processor, or on the clock if only these were measured; None for a run that was suspended."""
    seconds = found.get("processor_seconds", found["seconds"])
    return None if seconds is None else seconds / 60


def summarise(cells: Cells) -> Values:
    kinds = list(next(iter(cells.values()))["kinds"])
    worst = {cell: max(found["kinds"].items(), key=lambda one: one[1]) for cell, found in cells.items()}
    return {
        "kinds": kinds, "texts": list(next(iter(cells.values()))["ratio"]),
        "rows": [
            {"cell": cell, "worst": worst[cell], "minutes": minutes(found), **found} for cell, found in cells.items()
        ],
        "missing": [cell for cell in CELLS if cell not in cells],
    }  # fmt: skip
