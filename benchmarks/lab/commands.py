"""Commands of saap in processes of their own, and models that they make once for several cells."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from harness.experiment import Request, Values
from harness.store import ROOT

T = TypeVar("T")
VALIDATION = "benchmarks/data/wikitext2/validation.jsonl.gz"
TEST = "benchmarks/data/wikitext2/test.jsonl.gz"
"""Named from the root, where commands run: their records name no place of the machine."""


def saap(*arguments: object) -> dict[str, Any]:
    """What a command prints with `--json`."""
    command = [sys.executable, "-m", "saap", *map(str, arguments), "--json"]
    return dict(json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout))


def timed_saap(*arguments: object) -> tuple[dict[str, Any], float, float]:
    """The same with wall-clock and processor seconds of the whole command."""
    before, start = os.times(), time.perf_counter()
    report = saap(*arguments)
    seconds, after = time.perf_counter() - start, os.times()
    used = after.children_user - before.children_user + after.children_system - before.children_system
    return report, seconds, used


def peak_of(report: Values) -> int:
    """Largest resident set over the stages of a run."""
    return max(int(stage["peak_resident_bytes"]) for stage in report["stages"])


def compared(model: str, methods: Mapping[str, Sequence[str]], *flags: object, out: Path | None = None) -> Values:
    """The content of `comparison.json` after `saap compare`.

    methods: by `yes`, `no` or `both`, what runs with and without least-squares reconstruction. out: to resume there.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "compared" if out is None else out.resolve()
        for restore, names in methods.items():
            command = ["compare", model, "--out", folder, "--methods", ",".join(names), "--restore", restore, *flags]
            call = [sys.executable, "-m", "saap", *map(str, command), "--quiet"]
            subprocess.run(call, check=True, cwd=ROOT)
        return dict(json.loads((folder / "comparison.json").read_text()))


def in_own_process(work: Callable[..., T], *arguments: object, start: str = "spawn") -> T:
    """What a function of a module gives in a new process; start: `fork` for one that has our imports already."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(start)) as pool:
        return pool.submit(work, *arguments).result()


def made_by_saap(request: Request, name: str, arguments: Sequence[object]) -> Path:
    """The folder that `saap ARGUMENTS --out FOLDER` writes, made if it is not there; the command resumes itself.

    name: of the folder, which says all that decides its content.
    """
    folder = request.work.resolve() / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        call = [sys.executable, "-m", "saap", *map(str, arguments), "--out", str(folder), "--quiet"]
        subprocess.run(call, check=True, cwd=ROOT)
    return folder


def pruned_folder(request: Request, *flags: str, name: str = "default") -> Path:
    """The model pruned by 20 %: by the default, for a smoke run by the least effort and not restored."""
    if request.quick:
        name, flags = "quick", ("--effort", "fast", "--no-restore")
    prune = ["prune", request.model, "--pruning-ratio", "0.2", *flags]
    return made_by_saap(request, f"pruned-{name}-{Path(request.model).name}", prune)


def quickly_pruned(request: Request, layout: str, ratio: str) -> Path:
    """The model pruned with effort `fast`, in a layout."""
    flags = ["--pruning-ratio", ratio, "--effort", "fast", "--layout", layout]
    return made_by_saap(request, f"{layout}/{ratio}", ["prune", request.model, *flags])


def recovered_folder(request: Request, minutes: float) -> Path:
    """The pruned model after that many minutes of tuning on the default data."""
    source = pruned_folder(request)
    few = ["--max-steps", "2", "--length", "64", "--validation-samples", "1"]
    flags = few if request.quick else ["--max-minutes", f"{minutes:g}"]
    return made_by_saap(request, f"{source.name}-recovered", ["recover", str(source), *flags])
