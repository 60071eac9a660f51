"""`saap` in processes of its own, forked from one that has its imports: a new interpreter takes seconds to get them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from subprocess import CompletedProcess

TIMEOUT = 1200
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([
    "transformers.models.llama.modeling_llama", "saap.pipeline.prune.run", "saap.pipeline.recover.run",
    "saap.cli.app", "tests.processes", "tests.texts",
])  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A process that was started, and the files that it prints into."""

    process: ForkServerProcess
    out: Path
    err: Path

    def kill_at(self, text: str) -> None:
        """Kill the process without a chance to clean up, once it has printed the text."""
        while text not in self.out.read_text():
            assert self.process.is_alive(), self.err.read_text()
            time.sleep(0.005)
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def finished(self) -> CompletedProcess[str]:
        """Its exit code and what it has printed."""
        self.process.join(TIMEOUT)
        assert self.process.exitcode is not None, "it takes too long"
        code, out, err = self.process.exitcode, self.out.read_text(), self.err.read_text()
        return CompletedProcess([], code, out, err)


def saap(*arguments: object) -> CompletedProcess[str]:
    """What becomes of `saap` with these arguments."""
    return start(*arguments).finished()


def saap_in_several(count: int, *arguments: object) -> list[CompletedProcess[str]]:
    """The same in several processes that work together, as torchrun starts them."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    together = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    runs = [
        start(*arguments, environment={**together, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]  # fmt: skip
    return [run.finished() for run in runs]


def python(code: str, *arguments: object) -> CompletedProcess[str]:
    """What becomes of a program, which finds saap's imports done."""
    return start(*arguments, code=code).finished()


def start(*arguments: object, code: str | None = None, environment: dict[str, str] | None = None) -> Run:
    """Start `saap`, or a program, and go on."""
    folder = Path(tempfile.mkdtemp(prefix="saap-run-"))
    for name in ("out", "err"):
        (folder / name).touch()
    words = ["-c" if code is not None else "saap", *map(str, arguments)]
    process = _context.Process(target=_carry_out, args=(words, code, {**os.environ, **(environment or {})}, folder))
    process.start()
    return Run(process, folder / "out", folder / "err")


def _carry_out(words: list[str], code: str | None, environment: dict[str, str], folder: Path) -> None:
    from tests import found, texts

    from saap.cli import app

    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout.reconfigure(line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = words
    if code is None:
        found.share(setattr)
        texts.share(setattr)
        texts.measure_little(setattr)
    try:
        if code is None:
            app.main()
        else:
            exec(code, {"__name__": "__main__"})
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
