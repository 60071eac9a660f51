"""What several processes save of the estimation's time, one thread each.

    python benchmarks/processes.py [--model smollm2] [--processes 2] [--samples 50] [--length 128] [--rounds 2]

One process and several, in turns; the same random token ids, float32, on the CPU. Timed is the estimation alone, from
the moment in which all are ready until all have the whole result, after a short one that warms up; the least of the
rounds counts. Also compared are the scores. Writes benchmarks/results/processes.json and the table of
benchmarks/README.md. To be run while the machine does nothing else: it needs as many idle cores as there are processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from readme_tables import write_between_marks

RESULT = Path(__file__).resolve().parent / "results" / "processes.json"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def estimate_once(options: argparse.Namespace) -> None:
    """What each process does; the first one writes the seconds and, beside them, the scores."""
    import torch

    from saap.core.records import CalibrationSet
    from saap.core.storage import write_scores
    from saap.discovery import discover
    from saap.estimation.calibrate import estimate
    from saap.models.loading.devices import quick_float32_products
    from saap.models.loading.pretrained import load_model
    from saap.models.loading.references import resolve_model
    from saap.models.walk.backend import Backend
    from saap.models.walk.processes import Processes

    torch.set_num_threads(1)
    with quick_float32_products():
        processes = Processes.found()
        model = load_model(resolve_model(options.model), device=torch.device("cpu"), dtype=torch.float32)
        graph = discover(model)
        shape = (options.samples, options.length)
        tokens = np.random.default_rng(0).integers(5, model.config.vocab_size, shape)
        samples = CalibrationSet(sources=("random",), seed=0, tokens=tokens)
        few = CalibrationSet(sources=("random",), seed=0, tokens=tokens[: 2 * processes.count])
        estimate(Backend(model, graph, processes), few)
        processes.barrier()
        start = time.perf_counter()
        scores = estimate(Backend(model, graph, processes), samples)
        seconds = time.perf_counter() - start
        if processes.first:
            write_scores(options.part.with_suffix(".safetensors"), scores)
            options.part.write_text(json.dumps({"seconds": seconds}))


def run(options: argparse.Namespace, count: int, part: Path) -> float:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", __file__]
    for name in ("model", "samples", "length"):
        command += [f"--{name}", str(getattr(options, name))]
    subprocess.run([*command, "--part", str(part)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return float(json.loads(part.read_text())["seconds"])


def largest_difference(first: Path, second: Path) -> float:
    """Of all statistics, relative to the largest of its group."""
    from saap.core.storage import read_scores

    one, other = read_scores(first).groups, read_scores(second).groups
    names = ("vector", "vector_m2", "element", "element_m2", "comoment")
    pairs = [(getattr(one[group], name), getattr(other[group], name)) for group in one for name in names]
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)


def table(result: dict[str, Any]) -> str:
    size = f"{result['model']}, {result['samples']} samples of {result['length']} tokens"
    lines = [f"{size}:", "", "| processes | s | speed-up |", "|---|---|---|"]
    for count, found in result["seconds"].items():
        lines.append(f"| {count} | {min(found):.1f} | {'' if count == '1' else format(result['speedup'], '.2f')} |")
    return "\n".join(
        [*lines, "", f"Largest difference of a statistic: {result['largest_difference']:.0e} of its largest value."]
    )


def main() -> None:
    options = arguments()
    if options.part is not None:
        estimate_once(options)
        return
    seconds: dict[int, list[float]] = {1: [], options.processes: []}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        parts = {count: Path(folder) / f"{count}.json" for count in seconds}
        for _ in range(options.rounds):
            for count, found in seconds.items():
                found.append(run(options, count, parts[count]))
        difference = largest_difference(*(part.with_suffix(".safetensors") for part in parts.values()))
    result: dict[str, Any] = {
        "model": options.model,
        "samples": options.samples,
        "length": options.length,
        "seconds": {str(count): found for count, found in seconds.items()},
        "speedup": min(seconds[1]) / min(seconds[options.processes]),
        "largest_difference": difference,
        "environment": {"cores": os.cpu_count(), "load_before": load},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    write_between_marks("processes", table(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
