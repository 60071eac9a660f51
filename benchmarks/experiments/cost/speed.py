"""Prefill and decode speed of pruned folders compared with the dense model, in llama.cpp and in transformers."""

import statistics
from pathlib import Path
from typing import Any

import torch
from harness.charts import lines
from harness.digests import PRUNING
from harness.experiment import Cells, Figures, Measured, Names, Request, Values
from lab.commands import made_by_saap, quickly_pruned
from lab.dense import model_in

from saap.core.manifest import RunManifest
from saap.evaluation.speed import Source
from saap.pipeline.evaluate.speed import compare_speeds
from saap.settings.evaluate import SpeedSettings
from saap.settings.export import GgufType
from saap.settings.registry import RuntimeName

PAPER_SPEEDUP = 1.05
"""The paper's speed-up of token generation, pruned over dense."""
RUNTIMES = {
    **{str(kind): (RuntimeName.LLAMA_CPP, kind) for kind in (GgufType.F16, GgufType.Q8_0, GgufType.Q4_1)},
    "float32": (RuntimeName.TRANSFORMERS, GgufType.F16),
}
"""By type of the weights."""
PRUNED = ("adaptive/0.2", "adaptive/0.4", "uniform/0.2", "uniform/0.4")
REQUESTED = ("asked/llama.cpp", "asked/transformers")
"""Folders pruned for a target speed in a runtime."""
TARGET_SPEEDUP = 1.3
THREADS, ROUNDS, NEW_TOKENS = 2, 7, 32
MEASURED = [*(f"{weights} {folder}" for weights in RUNTIMES for folder in PRUNED), *(f"float32 {f}" for f in REQUESTED)]
CELLS = [*MEASURED, *REQUESTED]
SMOKE = False
SETTINGS = {"dense": "{model}", "threads": THREADS, "rounds": ROUNDS, "tokens written": NEW_TOKENS}
DECIDED_BY = (*PRUNING, "export/gguf")


def measure(request: Request, wanted: Names) -> Measured:
    """Run this on an idle machine; the dense and the pruned model are interleaved."""
    torch.set_num_threads(THREADS)
    for cell in wanted:
        weights, _, name = cell.rpartition(" ")
        kind, _, value = name.partition("/")
        if kind == "asked":
            flags = ["--target-speedup", TARGET_SPEEDUP, "--runtime", value, "--effort", "fast"]
            folder = made_by_saap(request, name, "prune", request.model, *flags)
        else:
            folder = quickly_pruned(request, kind, value)
        manifest = RunManifest.model_validate_json((folder / "saap" / "manifest.json").read_bytes())
        known = {"layout": str(manifest.layout), "removed": manifest.block_parameters.removed}
        if weights:
            yield cell, {**known, **measured(request, folder, *RUNTIMES[weights])}
        elif manifest.speed is not None:
            yield cell, {**known, **manifest.speed.model_dump()}


def measured(request: Request, folder: Path, runtime: RuntimeName, kind: GgufType) -> Values:
    chosen = SpeedSettings(runtime=runtime, gguf_type=kind, rounds=ROUNDS, new_tokens=NEW_TOKENS)
    dense: Source = model_in(request.model) if runtime is RuntimeName.TRANSFORMERS else request.model
    report = compare_speeds([(str(folder), str(folder)), ("dense", dense)], chosen)
    names = ("runtime", "weights", "prefill_speedup", "decode_speedup", "bytes_ratio")
    found: dict[str, Any] = {name: getattr(report, name) for name in names}
    assert report.against is not None
    for suffix, one in (("", report.model), ("_dense", report.against)):
        found |= {f"prefill{suffix}": one.prefill, f"decode{suffix}": one.decode, f"bytes{suffix}": one.bytes_per_token}
    return {**found, "over_bytes": found["decode_speedup"] / found["bytes_ratio"]}


def dense_decoding(found: Cells, types: Names) -> dict[str, float]:
    """Tokens/s of the dense model by type of the weights, for other pages."""
    speeds = {kind: [found[f"{kind} {folder}"]["decode_dense"] for folder in PRUNED] for kind in types}
    return {kind: statistics.median(values) for kind, values in speeds.items()}


def summarise(found: Cells) -> Values:
    rows = [found[name] for name in MEASURED]
    near = [row for row in rows if abs(row["removed"] - 0.2) < 0.01]
    gains = {kind: [row["decode_speedup"] for row in near if row["weights"] == kind] for kind in ("f16", "float32")}
    requested = [found[folder] for folder in REQUESTED]
    return {
        "rows": rows, "paper_speedup": PAPER_SPEEDUP, "removed": min(row["removed"] for row in near),
        "llama_cpp": [min(gains["f16"]), max(gains["f16"])],
        "transformers": [min(gains["float32"]), max(gains["float32"])],
        "requested": requested, "worst_of_requested": max(abs(row["reached"] / row["asked"] - 1) for row in requested),
    }  # fmt: skip


def figures(summary: Values) -> Figures:
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in sorted(summary["rows"], key=lambda row: float(row["removed"])):
        places, values = series.setdefault(f"{row['runtime']} {row['weights']}, {row['layout']}", ([], []))
        places.append(100 * row["removed"])
        values.append(row["decode_speedup"])
    return [lines("speed", series, x="% of the decoder blocks removed", y="decode, pruned / dense")]
