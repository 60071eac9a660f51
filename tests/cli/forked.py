"""Runs the real command line many times without importing everything each time: `python forked.py JOBS RESULTS`.

Each job is a process of its own, forked after the imports and before any gradient was computed. A job may be stopped by
a signal at the Nth event: progress that the run reports, or a file that it flushes or puts in its place.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from saap import cli
from saap.display import PlainReporter
from saap.pipeline import inputs
from saap.pipeline import run as run_module


class Events:
    """Counts events, and sends a signal to the process itself at one of them."""

    def __init__(self, number: int | None, at: int | None) -> None:
        self.count, self._signal, self._at = 0, number, at

    def __call__(self) -> None:
        self.count += 1
        if self._signal is not None and self.count == self._at:
            os.kill(os.getpid(), self._signal)

    def watch(self, holder: Any, name: str) -> None:
        stock = getattr(holder, name)

        def watched(*arguments: Any, **keywords: Any) -> Any:
            self()
            return stock(*arguments, **keywords)

        setattr(holder, name, watched)


def carry_out(job: dict[str, Any], counted: Path) -> None:
    # A parent that runs in the background of a shell ignores this signal, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    events = Events(job.get("signal"), job.get("at"))
    for name in ("stage", "advance", "note"):
        events.watch(PlainReporter, name)
    events.watch(os, "fsync")
    for name in ("replace", "rename"):
        events.watch(Path, name)
    if job.get("largest_file"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"], job["largest_file"]))
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["saap", *job["arguments"]]
    code: Any = 1
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    finally:
        if not job.get("largest_file"):
            counted.write_text(str(events.count))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def forked(job: dict[str, Any], counted: Path) -> dict[str, Any]:
    counted.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        carry_out(job, counted)
    status = os.waitpid(child, 0)[1]
    events = int(counted.read_text()) if counted.exists() else None
    return {"code": os.waitstatus_to_exitcode(status), "events": events}


def main() -> None:
    jobs, results = Path(sys.argv[1]), Path(sys.argv[2])
    wanted = json.loads(jobs.read_text())
    torch.set_num_threads(1)
    sys.argv = ["saap", *wanted["warm_up"]]
    # Discovery gives the same graph each time and keeps nothing, so all jobs share one.
    stock, found = run_module.discover, []

    def discover_once(model: Any, ref: Any) -> Any:
        if not found:
            found.append(stock(model, ref))
        return found[0]

    run_module.discover = discover_once
    inputs.EVALUATION_TOKENS = 512  # what is measured of a result does not matter here
    with suppress(SystemExit):  # the jobs say what is wrong
        cli.main()
    counted = results.with_suffix(".count")
    results.write_text(json.dumps([forked(job, counted) for job in wanted["jobs"]]))


if __name__ == "__main__":
    main()
