"""What only an accelerator can show: its tests, LLaMA-7B in bfloat16, and a model of 1.5 billion parameters end to end.

Cells, each of which `benchmarks/gpu.py` measures as well:

- tests: those marked `gpu`.
- 7b: random weights in the sizes of LLaMA-7B, pruned by 20 % with effort `default`. What it computes is of no interest,
  only time and peak memory of every stage.
- 1.5b: random weights in the sizes of Qwen2.5 1.5B, pruned and tuned: for a machine that gets no packages.
- real: the same with the weights of `--set model=FILE.gguf` (Qwen2.5-Coder 1.5B, say), and perplexity before and after.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness.experiment import Cells, Experiment, Measured, Request, Values
from harness.store import ROOT
from lab.checkpoints import SHAPES, Shape, byte_tokenizer, write_checkpoint
from lab.commands import saap
from lab.texts import TEXTS

TINY = Shape(64, 160, 2, 4, vocabulary=320)
PRUNE = ["--pruning-ratio", "0.2"]
SMOKE_PRUNE = ["--effort", "fast", "--samples", "4", "--sample-length", "32", "--refit-tokens", "1024"]
RECOVER, SMOKE_RECOVER = ["--max-minutes", "2"], ["--max-steps", "2", "--length", "32"]
STAGE = ("name", "seconds", "peak_resident_bytes", "peak_device_bytes")


def shape_of(request: Request, name: str) -> Shape:
    return replace(TINY, key_heads=SHAPES[name].key_heads) if request.quick else SHAPES[name]


def random_checkpoint(request: Request, name: str) -> Path:
    """Written once; another cell and a run that goes on use it again."""
    folder = request.work / f"random-{name}"
    if not (folder / "tokenizer.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_checkpoint(shape_of(request, name), folder)
        byte_tokenizer().save_pretrained(folder)
    return folder


def reported(command: str, source: Path, out: Path, flags: Sequence[str]) -> dict[str, Any]:
    """Run a command, and keep time and memory of every stage."""
    report = saap(command, source, "--out", out, "--overwrite", *flags)
    stages = [{name: stage[name] for name in STAGE} for stage in report["stages"]]
    return {"command": " ".join([f"saap {command} MODEL", *flags]), "stages": stages}


def pruned(request: Request, source: Path, name: str) -> dict[str, Any]:
    flags = [*PRUNE, *(SMOKE_PRUNE if request.quick else ["--effort", "default"])]
    return reported("prune", source.resolve(), request.work.resolve() / f"pruned-{name}", flags)


def run_tests(request: Request) -> dict[str, Any]:
    folder = "tests/cli" if request.quick else "tests"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-4000:])
    return {"summary": done.stdout.strip().splitlines()[-1]}


def prune_7b(request: Request) -> dict[str, Any]:
    source = random_checkpoint(request, "7b")
    found = pruned(request, source, "7b")
    for folder in (source, request.work / "pruned-7b"):
        shutil.rmtree(folder)
    return {"parameters": shape_of(request, "7b").parameters, **found}


def all_stages(request: Request, source: Path, name: str) -> dict[str, Any]:
    """Pruned, reconstructed, and tuned for some minutes on the bundled text."""
    first, work = pruned(request, source, name), request.work.resolve()
    flags = SMOKE_RECOVER if request.quick else RECOVER
    return {"prune": first, "recover": reported("recover", work / f"pruned-{name}", work / f"tuned-{name}", flags)}


def prune_1_5b(request: Request) -> dict[str, Any]:
    source = random_checkpoint(request, "1.5b")
    return {"parameters": shape_of(request, "1.5b").parameters, **all_stages(request, source, "1.5b")}


def prune_real(request: Request) -> dict[str, Any]:
    source = Path(request.given["model"]) if "model" in request.given else random_checkpoint(request, "1.5b")
    found, work = all_stages(request, source, "real"), request.work.resolve()
    text, tokens = TEXTS["wikitext2"], "600" if request.quick else "16384"
    models = {"dense": source.resolve(), "pruned": work / "pruned-real", "tuned": work / "tuned-real"}
    measured = {
        name: saap("eval", model, "--perplexity", text, "--max-tokens", tokens)["perplexity"][str(text)]["value"]
        for name, model in models.items()
    }
    return {"model": source.name, **found, "perplexity": measured}


STEPS: Mapping[str, Callable[[Request], dict[str, Any]]] = {
    "tests": run_tests,
    "7b": prune_7b,
    "1.5b": prune_1_5b,
    "real": prune_real,
}


def cells(request: Request) -> list[str]:
    """All of them, the last one where there are real weights."""
    return [name for name in STEPS if name != "real" or "model" in request.given or request.quick]


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "Apple GPU" if torch.backends.mps.is_available() else platform.processor() or "CPU"


def has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    if not (request.quick or has_accelerator()):
        print("accelerator: there is none here; --quick tries every step on the CPU")
        return
    for name in wanted:
        yield name, {"device": device_name(), "torch": torch.__version__, **STEPS[name](request)}


def summarise(found: Cells) -> dict[str, Any]:
    """Every stage of every step that has run."""
    rows: list[Values] = []
    for name, cell in found.items():
        for command, part in (("prune", cell.get("prune", cell)), ("recover", cell.get("recover", {}))):
            rows += [{"step": name, "device": cell["device"], "command": command, **s} for s in part.get("stages", ())]
    whole = [row for row in rows if row["step"] == "7b"]
    return {
        "rows": rows,
        "parameters": found["7b"]["parameters"] / 1e9,
        "seconds": sum(row["seconds"] for row in whole),
        "memory": max(row["peak_device_bytes"] for row in whole) / 1e9,
    }


EXPERIMENT = Experiment(
    name="accelerator", cells=cells, measure=measure, summarise=summarise, options={"model": "FILE.gguf"},
    extra=("real",),
)  # fmt: skip
