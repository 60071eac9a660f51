"""What the estimation costs: time against a plain forward and backward pass, memory above the loaded model.

python benchmarks/estimation.py MODEL [--samples 50] [--length 128] [--micro-batch 2] [--threads 2] [--rounds 2]

Random token ids; float32. Time: estimation and loss.backward() with weight gradients over the same tokens in the same
batches, interleaved, medians; cpu_ratio is the same of processor seconds, steadier on a busy machine. Memory: a
process of its own; peak resident size while estimating, minus that of the loaded model at rest (every weight touched,
freed heap given back), relative to the bytes of the weights.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saap.core.records import CalibrationSet
from saap.estimation.calibrate import estimate
from saap.models.loading.pretrained import load_model
from saap.models.loading.references import resolve_model
from saap.models.walk.backend import Backend
from saap.models.walk.walker import inference_only

MEASUREMENTS = ("graph", "time", "memory")


def load(options: argparse.Namespace) -> Any:
    torch.set_num_threads(options.threads)
    return load_model(resolve_model(options.model), device=torch.device("cpu"), dtype=torch.float32)


def calibration(options: argparse.Namespace, model: Any) -> CalibrationSet:
    tokens = np.random.default_rng(0).integers(5, model.config.vocab_size, (options.samples, options.length))
    return CalibrationSet(sources=("random",), seed=0, tokens=tokens)


def measure_graph(options: argparse.Namespace) -> dict[str, float]:
    from saap.discovery import discover

    options.graph.write_bytes(pickle.dumps(discover(load(options))))
    return {}


def measure_time(options: argparse.Namespace) -> dict[str, float]:
    model = load(options)
    graph, samples = pickle.loads(options.graph.read_bytes()), calibration(options, model)
    rows = options.micro_batch
    few = CalibrationSet(sources=("random",), seed=0, tokens=samples.tokens[: max(2, rows)])
    passes: dict[str, Callable[[CalibrationSet], object]] = {
        "plain": lambda tokens: plain_pass(model, tokens.tokens, rows),
        "estimation": lambda tokens: estimate(Backend(model, graph), tokens, micro_batch=rows),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in passes}
    for run in passes.values():
        run(few)
    for _ in range(options.rounds):
        for name, run in passes.items():
            start = time.perf_counter(), time.process_time()
            run(samples)
            seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
            model.zero_grad(set_to_none=True)
    (plain, plain_cpu), (estimation, estimation_cpu) = (
        tuple(statistics.median(column) for column in zip(*pairs, strict=True)) for pairs in seconds.values()
    )
    return {
        "plain_seconds": plain,
        "estimation_seconds": estimation,
        "time_ratio": estimation / plain,
        "cpu_ratio": estimation_cpu / plain_cpu,
    }


def plain_pass(model: torch.nn.Module, tokens: np.ndarray, rows: int) -> None:
    model.requires_grad_(True)
    for batch in torch.split(torch.from_numpy(tokens), rows):
        model(batch, labels=batch, use_cache=False).loss.backward()


def measure_memory(options: argparse.Namespace) -> dict[str, float]:
    model = load(options).requires_grad_(False)
    graph, samples = pickle.loads(options.graph.read_bytes()), calibration(options, model)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with inference_only(model):
        for parameter in model.parameters():
            parameter.sum()
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with Peak() as peak:
        estimate(Backend(model, graph), samples, micro_batch=options.micro_batch)
    above = peak.bytes - peak.at_rest
    return {
        "weight_bytes": weights,
        "at_rest_bytes": peak.at_rest,
        "above_bytes": above,
        "memory_ratio": above / weights,
    }


class Peak:
    """Peak resident bytes inside the context: the kernel's own mark where it can be reset, else sampled."""

    def __enter__(self) -> Peak:
        self.at_rest = self.bytes = resident()
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._reset = False
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self._reset = True
        self._sampler.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self.bytes = max(self.bytes, resident())

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._sampler.join()
        if self._reset:
            self.bytes = max(self.bytes, status("VmHWM"))


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def resident() -> int:
    """Resident bytes of this process; where the system does not say, their peak so far."""
    with suppress(OSError):
        return status("VmRSS")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of a causal language model")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    parser.add_argument("--graph", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.measure:
        measure = {"graph": measure_graph, "time": measure_time, "memory": measure_memory}[options.measure]
        print(json.dumps(measure(options)))
        return
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in MEASUREMENTS:
            command = [sys.executable, *sys.argv, "--measure", name, "--graph", str(Path(folder) / "graph")]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            figures |= json.loads(output.splitlines()[-1])
    print(json.dumps(figures, indent=1))
    print(f"estimation time / plain forward and backward: {figures['time_ratio']:.2f}")
    print(f"peak memory above the loaded model / weights: {figures['memory_ratio']:.3f}")


if __name__ == "__main__":
    main()
