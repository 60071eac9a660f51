"""Watching linear modules while a block runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Capture:
    """Input and output of a linear module at one call: (sequences, tokens, channels)."""

    input: Tensor
    output: Tensor


class _StopBlockError(Exception):
    """Ends a block's forward once the module of interest has run."""


@contextmanager
def capture(model: nn.Module, paths: Sequence[str], *, stop: bool = False) -> Iterator[dict[str, Capture]]:
    """Record input and output of the modules at `paths` in the order in which they run.

    stop: leave the forward as soon as the first of them has run (the `with` body ends there).
    """
    seen: dict[str, Capture] = {}

    def hook_for(path: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            seen[path] = Capture(arguments[0], output)
            if stop:
                raise _StopBlockError

        return hook

    handles = [model.get_submodule(path).register_forward_hook(hook_for(path)) for path in paths]
    try:
        yield seen
    except _StopBlockError:
        pass
    finally:
        for handle in handles:
            handle.remove()
