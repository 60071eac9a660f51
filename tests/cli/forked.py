"""Runs the real command line many times in forks of a process that has found the model's structure.

Each job is a process of its own, or several that work together, forked after the imports and before any gradient was
computed. A job may be stopped by a signal or an error at the Nth event: progress that the run reports, a micro-batch
that a later process scores, or a file that is flushed or put in its place.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

import saap.cli.recover  # before the change to RecoverConfig below: its flags are those of the class  # noqa: F401
from saap.cli import app as cli
from saap.cli.show.output import PlainReporter
from saap.core.errors import NonFiniteLossError
from saap.estimation.unit_importance import UnitImportance
from saap.models.loading import memory
from saap.models.walk import offload
from saap.pipeline.prune import run as run_module
from saap.pipeline.recover import run as recover
from saap.pipeline.shared import memory_limit, outcome, tokens
from saap.settings import recover as recovery_config
from saap.settings.recover import RecoverConfig


class Events:
    """Counts events, and at one of them sends a signal to the process itself or raises an error."""

    def __init__(self, number: int | None, error: str | None, at: int | None) -> None:
        self.count, self._signal, self._error, self._at = 0, number, error, at

    def __call__(self) -> None:
        self.count += 1
        if self.count != self._at:
            return
        if self._signal is not None:
            os.kill(os.getpid(), self._signal)
        if self._error is not None:
            raise NonFiniteLossError(self._error, "Mend it")

    def watch(self, holder: Any, name: str) -> None:
        stock = getattr(holder, name)

        def watched(*arguments: Any, **keywords: Any) -> Any:
            self()
            return stock(*arguments, **keywords)

        setattr(holder, name, watched)


def count_as_large() -> None:
    """A limit of one byte keeps the weights of the smallest model in their files."""
    offload.SMALL_BYTES = memory_limit.RESERVE_BYTES = 0
    memory.of_process = lambda: 0
    memory_limit.Needs.of = lambda sizes, config: memory_limit.Needs(2, 2, 1)


def carry_out(job: dict[str, Any], counted: Path, rank: int = 0) -> None:
    # A parent that runs in the background of a shell ignores this signal, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    disturbed = job.get("at") if rank == job.get("rank", 0) else None
    events = Events(job.get("signal"), job.get("error"), disturbed)
    for name in ("stage", "advance", "note"):
        events.watch(PlainReporter, name)
    events.watch(os, "fsync")
    for name in ("replace", "rename"):
        events.watch(Path, name)
    if rank:
        events.watch(UnitImportance, "observe_loss")
    if job.get("offloaded"):
        count_as_large()
    if job.get("largest_file"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"], job["largest_file"]))
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = ["saap", *job["arguments"]]
    code: Any = 1
    try:
        cli.main()
    except SystemExit as end:
        code = end.code
    finally:
        if not job.get("largest_file") and not rank:
            counted.write_text(str(events.count))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def forked(job: dict[str, Any], counted: Path) -> dict[str, Any]:
    """Exit codes of all processes of a job, the first one's also by itself, and the events of the first."""
    counted.unlink(missing_ok=True)
    for name in ("stdout", "stderr"):
        Path(job[name]).unlink(missing_ok=True)
    count, port = job.get("processes", 1), free_port()
    children = []
    for rank in range(count):
        children.append(os.fork())
        if children[-1] == 0:
            if count > 1:
                os.environ |= {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            carry_out(job, counted, rank)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    events = int(counted.read_text()) if counted.exists() else None
    return {"code": codes[0], "codes": codes, "events": events}


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port: int = trial.getsockname()[1]
    return port


def main() -> None:
    jobs, results = Path(sys.argv[1]), Path(sys.argv[2])
    wanted = json.loads(jobs.read_text())
    torch.set_num_threads(1)
    sys.argv = ["saap", *wanted["warm_up"]]
    # Discovery gives the same graph each time and keeps nothing, so all jobs share one.
    stock, found = run_module.discover, []

    def discover_once(model: Any, ref: Any, **options: Any) -> Any:
        if not found:
            found.append(stock(model, ref, **options))
        return found[0]

    run_module.discover = discover_once
    # what is measured of a result does not matter here
    tokens.EVALUATION_TOKENS, tokens.KIND_TOKENS = 128, 32
    recover.greedy_answer = outcome.greedy_answer = lambda model, tokenizer: ("", "")
    # `prune --recover` knows a limit in minutes only; after some steps it ends the same each time
    recovery_config.RecoverConfig = partial(RecoverConfig, **wanted["tuning"])
    with suppress(SystemExit):  # the jobs say what is wrong
        cli.main()
    counted = results.with_suffix(".count")
    results.write_text(json.dumps([forked(job, counted) for job in wanted["jobs"]]))
