"""Memory of this process."""

import ctypes
import gc
from contextlib import suppress

import torch

from saap.models.loading import memory


class Peak:
    """Largest resident size inside the context.

    before: the resident size on entry, after freed memory was returned to the system. bytes: the largest size, set
    after the context.
    """

    def __enter__(self) -> "Peak":
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        memory.reset_peak(torch.device("cpu"))
        self.before = self.bytes = memory.of_process()
        return self

    def __exit__(self, *error: object) -> None:
        self.bytes = memory.peak_of_process()
