"""Recovery from what the teacher predicts most, stored on the disk, against the teacher in memory."""

import math
import tempfile
from pathlib import Path

from harness.digests import MAKING
from harness.experiment import Cells, Measured, Names, Request, Scaled, Values
from lab.commands import made_by_saap, peak_of, saap
from lab.dense import source_of
from lab.measures import geometric_mean
from lab.texts import TEXTS, perplexities

from experiments.quality.models import GEMMA, SMOLLM2
from saap.pipeline.shared.stages import STORE_PREDICTIONS

MODELS = (SMOLLM2, GEMMA)
LIVE = "in memory"
KEPT = {LIVE: None, "8": 8, "64": 64, "256": 256}
"""Tokens of a prediction, None for all."""
CELLS = [f"{model}/{name}" for model in MODELS for name in ("dense", "pruned", *KEPT)]
SETTINGS = {
    "pruning ratio": 0.2, "tuning": "full", "tokens": Scaled(128, 40_000), "length": Scaled(64, 512),
    "measured tokens": Scaled(512, 4096),
}  # fmt: skip
DECIDED_BY = MAKING
PARTIAL = True


def measure(request: Request, wanted: Names) -> Measured:
    """Tune each pruned model, in the default of `saap prune`, on the default text."""
    chosen = request.settings
    for cell in wanted:
        model, _, name = cell.partition("/")
        dense = source_of(request, model)
        if name == "dense":
            yield cell, {"perplexity": perplexities(dense, TEXTS, most=chosen["measured tokens"])}
            continue
        least = request.size(["--effort", "fast", "--no-restore"], [])
        pruning = ["prune", dense, "--pruning-ratio", chosen["pruning ratio"], *least]
        pruned = made_by_saap(request, f"{model}-{request.size('trial', 'pruned')}", *pruning)
        if name == "pruned":
            yield cell, {"perplexity": perplexities(pruned, TEXTS, most=chosen["measured tokens"])}
            continue
        with tempfile.TemporaryDirectory(dir=request.work) as temporary:
            folder = Path(temporary)
            stored = ["--teacher-logits", folder / "logits", "--teacher-top-k", KEPT[name]] if KEPT[name] else []
            report = saap(
                "recover", pruned, "--dense", dense, "--tuning", chosen["tuning"], "--max-tokens", chosen["tokens"],
                "--max-seq-length", chosen["length"], "--out", folder / "tuned", *stored,
            )  # fmt: skip
            storing = [stage["seconds"] for stage in report["stages"] if stage["name"] == STORE_PREDICTIONS.title]
            found = perplexities(folder / "tuned", TEXTS, most=chosen["measured tokens"])
            size = sum(file.stat().st_size for file in (folder / "logits").glob("*")) if stored else 0
            yield cell, {
                "perplexity": found, "tokens": report["tokens"], "seconds": report["seconds"], "storing": sum(storing),
                "peak_bytes": peak_of(report), "stored_bytes": size,
            }  # fmt: skip


def summarise(cells: Cells) -> Values:
    """By model, each way with the share of the gap in log-perplexity that it closes, and the time of a token."""
    groups = []
    for model in MODELS:
        rows = {name: cells[f"{model}/{name}"] for name in ("dense", "pruned", *KEPT) if f"{model}/{name}" in cells}
        if not {"dense", "pruned", LIVE} <= rows.keys():
            continue
        means = {name: math.log(geometric_mean(list(row["perplexity"].values()))) for name, row in rows.items()}
        gap = means["pruned"] - means["dense"]
        ways = {
            name: {"closed": (means["pruned"] - means[name]) / gap, "kept": KEPT[name], **row}
            for name, row in rows.items() if name in KEPT
        }  # fmt: skip
        live, most = ways[LIVE], ways[list(ways)[-1]]
        token = live["seconds"] / live["tokens"]
        groups.append({
            "model": model, "live": live, "ways": ways, "most": most, "memory": most["peak_bytes"] / live["peak_bytes"],
            **{name: most[name] / most["tokens"] / token for name in ("seconds", "storing")},
        })  # fmt: skip
    return {"groups": groups}
