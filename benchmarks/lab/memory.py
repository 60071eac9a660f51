"""Memory of this process."""

from __future__ import annotations

import ctypes
import gc
import threading
from contextlib import suppress
from pathlib import Path


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at most so far; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def give_back() -> None:
    """Give freed memory back to the system, so that it does not count."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Peak:
    """Largest resident size inside the context: by the kernel's own mark where it can be reset, else by looking.

    before: the resident size on entry. bytes: the largest one, known after the context.
    """

    def __enter__(self) -> Peak:
        self.before = self.bytes = status("VmRSS")
        self._over = threading.Event()
        self._looking = threading.Thread(target=self._look, daemon=True)
        self._reset = False
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            self._reset = True
        self._looking.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(0.002):
            self.bytes = max(self.bytes, status("VmRSS"))

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._looking.join()
        if self._reset:
            self.bytes = max(self.bytes, status("VmHWM"))
