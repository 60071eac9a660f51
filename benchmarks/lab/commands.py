"""Commands of saap in separate processes, and models that are made once for several cells."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

from harness.digests import MAKING, code_file, digests
from harness.experiment import Request, Values
from harness.store import ROOT, write_json

from saap.cli import app as cli

T = TypeVar("T")
IMPORTS = ["transformers.models.llama.modeling_llama", "saap.pipeline.prune.run", "saap.pipeline.recover.run", "pytest"]
"""Preloaded modules of processes; pytest, since it starts them in a smoke run."""
VALIDATION = "benchmarks/data/wikitext2/validation.jsonl.gz"
TEST = "benchmarks/data/wikitext2/test.jsonl.gz"
"""Relative to the root, where commands run, so that records have no absolute paths."""
FLAGS = {
    "pruning ratio": "--pruning-ratio", "calibration": "--calibration", "samples": "--num-samples",
    "sample length": "--sample-length", "refit tokens": "--refit-tokens", "effort": "--effort",
    "measured on": "--perplexity", "measured tokens": "--max-tokens", "window": "--window", "tasks": "--tasks",
    "questions of a task": "--limit",
}  # fmt: skip
"""By the names of experiments' settings."""


def in_own_process(work: Callable[..., T], *arguments: object, start: str = "forkserver") -> T:
    """Result of a function of a module in a new process.

    start: `fork` copies this process, `spawn` imports everything anew; otherwise the process has only imported what a
    run needs.
    """
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(IMPORTS)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


def run_here(words: Sequence[str]) -> str:
    """Output of a command of saap, run in this process."""
    os.chdir(ROOT)
    sys.argv = ["saap", *words]
    with redirect_stdout(StringIO()) as printed:
        try:
            cli.main()
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"saap {' '.join(words)} ended with {end.code}") from None
    return printed.getvalue()


def saap(*arguments: object) -> dict[str, Any]:
    """Output of a command with `--json`."""
    return dict(json.loads(in_own_process(run_here, [*map(str, arguments), "--json"])))


def timed_saap(*arguments: object) -> tuple[dict[str, Any], float, float]:
    """The same with wall-clock and processor seconds of the whole command, the start of Python included."""
    before, start = os.times(), time.perf_counter()
    command = [sys.executable, "-m", "saap", *map(str, arguments), "--json"]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout
    seconds, after = time.perf_counter() - start, os.times()
    used = after.children_user - before.children_user + after.children_system - before.children_system
    return dict(json.loads(printed)), seconds, used


def flags_from(settings: Values, *left_out: str) -> list[str]:
    """Flags of saap with the values of an experiment's settings."""
    used = [name for name in FLAGS if name in settings and name not in left_out]
    return [word for name in used for word in (FLAGS[name], str(settings[name]))]


def peak_of(report: Values) -> int:
    """Largest resident set over the stages of a run."""
    return max(int(stage["peak_resident_bytes"]) for stage in report["stages"])


def compared(model: str, methods: Mapping[str, Sequence[str]], *flags: object, out: Path | None = None) -> Values:
    """The content of `comparison.json` after `saap compare`.

    methods: by `yes`, `no` or `both`, for least-squares reconstruction. out: folder to resume in.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "compared" if out is None else out.resolve()
        for restore, names in methods.items():
            command = ["compare", model, "--out", folder, "--methods", ",".join(names), "--restore", restore, *flags]
            in_own_process(run_here, [*map(str, command), "--quiet"])
        return dict(json.loads((folder / "comparison.json").read_text()))


def made_by_saap(request: Request, name: str, *arguments: object) -> Path:
    """The folder of `saap ARGUMENTS --out FOLDER`, created if missing; the command resumes itself.

    name: of the folder, which determines its content. It stays when the code changes, as it may have taken hours: the
    digests of its code are beside it, and `book.py stale` lists it. So the process that makes it imports saap anew.
    """
    folder = request.work.resolve() / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        code, start = digests(MAKING), "forkserver" if request.quick else "spawn"
        in_own_process(run_here, [*map(str, arguments), "--out", str(folder), "--quiet"], start=start)
        write_json(code_file(folder), code)
    return folder


def pruned_folder(request: Request, *flags: str, name: str = "default") -> Path:
    """The model pruned by 20 % with the default; in a smoke run with the lowest effort and without reconstruction."""
    if request.quick:
        name, flags = "quick", ("--effort", "fast", "--no-restore")
    prune = ["prune", request.model, "--pruning-ratio", "0.2", *flags]
    return made_by_saap(request, f"pruned-{name}-{Path(request.model).name}", *prune)


def quickly_pruned(request: Request, layout: str, ratio: str) -> Path:
    """The model pruned with effort `fast`, in a layout."""
    flags = ["--pruning-ratio", ratio, "--effort", "fast", "--layout", layout]
    return made_by_saap(request, f"{layout}/{ratio}", "prune", request.model, *flags)
