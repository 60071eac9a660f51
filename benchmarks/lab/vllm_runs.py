"""The environment of vLLM, and what it computes for a folder compared with transformers."""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from harness.experiment import Request, Values
from harness.store import ROOT

from saap.models.loading.pretrained import load

ENVIRONMENT = ROOT / ".vllm"
"""Where `make vllm` installs it."""
PROMPTS = [list(range(3, 15)), [50, 60, 70, 20]]
NEW_TOKENS = 12
IN_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1", "PYTHONPATH": "",
}  # fmt: skip
"""Environment variables with which vLLM runs in the process that asks, with a gigabyte for its cache."""


def vllm_python(request: Request) -> str:
    """The Python of vLLM's environment, as given by --set python=PATH or made by `make vllm`. Raises SystemExit."""
    given = request.given.get("python", str(ENVIRONMENT / "bin" / "python"))
    if not Path(given).is_file():
        raise SystemExit(f"There is no {given}: run `make vllm` first, or give --set python=PATH")
    return given


class Script:
    """A running script of vLLM's environment, which answers lines with lines."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def line(self, start: str) -> str:
        """Its next line that starts so. Raises RuntimeError if it ends before."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return line
        raise RuntimeError("vLLM's process has ended")

    def send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


@contextmanager
def script(python: str, name: str, *arguments: object) -> Iterator[Script]:
    """Run a script of this folder until the end of the block."""
    command = [python, str(Path(__file__).with_name(name)), *map(str, arguments)]
    process = subprocess.Popen(
        command, env={**os.environ, **IN_PROCESS}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield Script(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


@contextmanager
def worker(python: str) -> Iterator["Worker"]:
    with script(python, "vllm_worker.py") as started:
        yield Worker(started)


class Worker:
    """A running `vllm_worker.py`. versions: of vLLM and the packages that it runs with."""

    def __init__(self, started: Script) -> None:
        self._script = started
        self.versions: dict[str, str] = json.loads(started.line("{"))

    def run(self, folder: Path, sequences: Sequence[Sequence[int]], implementation: str) -> dict[str, Any]:
        """What vLLM's implementation of the model computes for a folder, or the error that it raised."""
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / "out.pt"
            request: dict[str, Any] = {"folder": str(folder), "prompts": PROMPTS, "sequences": sequences}
            request |= {"implementation": implementation, "new_tokens": NEW_TOKENS, "out": str(out)}
            self._script.send(json.dumps(request))
            self._script.line("@done")
            return dict(torch.load(out)) if out.is_file() else {"error": "The process of vLLM ended"}


@torch.no_grad()
def compared(runs: Worker, folder: Path, implementation: str = "transformers") -> Values:
    """vLLM and transformers, both in float32, on one folder.

    implementation: of vLLM, its Transformers backend or its own class (`vllm`).

    same: of how many prompts vLLM continues alike. divergence: largest Kullback-Leibler divergence of the next token
    over all places, in nats, over the whole vocabulary. refused: vLLM's first line, instead of both.
    """
    model = load(folder, device="cpu", dtype=torch.float32)
    plain = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    whole = [model.generate(torch.tensor([ids]), **plain)[0].tolist() for ids in PROMPTS]
    found = runs.run(folder, whole, implementation)
    if "error" in found:
        return {"refused": said(found["error"], folder)}
    same = sum(ids + tokens == ours for ids, tokens, ours in zip(PROMPTS, found["tokens"], whole, strict=True))
    divergence = 0.0
    for ids, theirs in zip(whole, found["log_probabilities"], strict=True):
        ours = model(torch.tensor([ids]), use_cache=False).logits[0, : len(theirs)].double().log_softmax(-1)
        divergence = max(divergence, float((ours.exp() * (ours - theirs)).sum(-1).max()))
    return {"same": same, "prompts": len(PROMPTS), "divergence": divergence}


def said(error: str, folder: Path) -> str:
    """An error without what differs from run to run."""
    lines = [line.strip() for line in error.splitlines() if line.strip() and "validation error" not in line]
    line = lines[0].removeprefix("Value error, ").partition(" [type=")[0] if lines else ""
    line = line.replace(str(folder), "FOLDER")
    return re.sub(r"transformers_modules\.\w+\.\w+\.", "", line)[:300]
