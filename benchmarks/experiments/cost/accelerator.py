"""On an accelerator: the tests marked `gpu`, and models of the sizes of LLaMA-7B and Qwen2.5 1.5B.

Weights are random, except in the cell `real`: those of `--set model=FILE.gguf`, with perplexity.
"""

import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from harness.digests import MAKING
from harness.experiment import Cells, Measured, Names, Request, Values
from harness.store import ROOT
from lab.checkpoints import SHAPES, llama, parameters_of, write_checkpoint
from lab.commands import saap
from lab.texts import TEXTS

PRUNE = ["--pruning-ratio", "0.2"]
SMOKE_PRUNE = ["--effort", "fast", "--num-samples", "4", "--sample-length", "32", "--refit-tokens", "1024"]
RECOVER, SMOKE_RECOVER = ["--max-minutes", "2"], ["--max-steps", "2", "--max-seq-length", "32"]
STAGE = ("name", "seconds", "peak_resident_bytes", "peak_device_bytes")
OPTIONS = {"model": "FILE.gguf"}
EXTRA = ("real",)
DECIDED_BY = MAKING


def reported(command: str, source: Path, out: Path, flags: Names) -> Values:
    report = saap(command, source, "--out", out, "--overwrite", *flags)
    stages = [{name: stage[name] for name in STAGE} for stage in report["stages"]]
    return {"command": " ".join([f"saap {command} MODEL", *flags]), "stages": stages}


def run_tests(request: Request) -> Values:
    folder = "tests/cli" if request.quick else "tests"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-4000:])
    return {"summary": done.stdout.strip().splitlines()[-1]}


def all_stages(request: Request, name: str) -> Values:
    """Prune and reconstruct a model; except for the 7B, also tune it for some minutes on the bundled text."""
    work, size = request.work.resolve(), "1.5b" if name == "real" else name
    pruned, tuned = work / f"pruned-{name}", work / f"tuned-{name}"
    shape = SHAPES[size]
    if request.quick:
        shape = llama(64, 160, 2, 4, 320, keys=min(shape.num_key_value_heads, 4))
    if name == "real" and "model" in request.given:
        dense = Path(request.given["model"]).resolve()
    else:
        dense = write_checkpoint(shape, work / f"random-{size}")
    found: dict[str, Any] = {"model": dense.name} if name == "real" else {"parameters": parameters_of(shape)}
    flags = [*PRUNE, *request.size(SMOKE_PRUNE, ["--effort", "default"])]
    made = reported("prune", dense, pruned, flags)
    if name == "7b":
        shutil.rmtree(dense)
        shutil.rmtree(pruned)
        return {**found, **made}
    found |= {"prune": made, "recover": reported("recover", pruned, tuned, request.size(SMOKE_RECOVER, RECOVER))}
    if name == "real":
        text, most = TEXTS["wikitext2"], request.size(600, 16384)
        reports = {
            state: saap("eval", folder, "--perplexity", text, "--max-tokens", most)
            for state, folder in (("dense", dense), ("pruned", pruned), ("tuned", tuned))
        }
        found["perplexity"] = {state: one["perplexity"][str(text)]["value"] for state, one in reports.items()}
    return found


def cells(request: Request) -> Names:
    return ["tests", "7b", "1.5b", *(["real"] if "model" in request.given or request.quick else [])]


def measure(request: Request, wanted: Names) -> Measured:
    device = "Apple GPU" if torch.backends.mps.is_available() else None
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    if not (request.quick or device):
        print("accelerator: there is none here; --quick tries every step on the CPU")
        return
    for name in wanted:
        found = run_tests(request) if name == "tests" else all_stages(request, name)
        yield name, {"device": device or platform.processor() or "CPU", "torch": torch.__version__, **found}


def summarise(found: Cells) -> Values:
    rows: list[Values] = []
    for name, cell in found.items():
        for command, part in (("prune", cell.get("prune", cell)), ("recover", cell.get("recover", {}))):
            rows += [{"step": name, "device": cell["device"], "command": command, **s} for s in part.get("stages", ())]
    whole = [row for row in rows if row["step"] == "7b"]
    return {
        "rows": rows, "parameters": found["7b"]["parameters"] / 1e9,
        "seconds": sum(row["seconds"] for row in whole),
        "memory": max(row["peak_device_bytes"] for row in whole) / 1e9,
    }  # fmt: skip
