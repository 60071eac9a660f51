"""Watching linear modules while a block runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saap.models.walk.walker import BlockWalker, Contexts


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


@dataclass(frozen=True, slots=True)
class InputAndGradient:
    """Input of a linear module at one call, and the gradient at its output: (sequences, tokens, channels)."""

    input: Tensor
    gradient: Tensor


def backward_to_outputs(
    walker: BlockWalker, layer: int, paths: Sequence[str], hidden: Tensor, contexts: Contexts, gradient: Tensor
) -> tuple[Tensor, dict[str, InputAndGradient]]:
    """Gradients at the input of a block and at the outputs of its modules at `paths`; the block is run again.

    hidden: its input; gradient: at its output; both (sequences, tokens, width).
    """
    with torch.enable_grad(), capture(walker.model, paths) as seen:
        entry = hidden.detach().requires_grad_(True)
        output = walker.run_block(layer, entry, contexts)
        sources = [entry, *(taken.output for taken in seen.values())]
        before, *found = torch.autograd.grad(output, sources, gradient.to(output.device), materialize_grads=True)
    each = zip(seen.items(), found, strict=True)
    return before, {path: InputAndGradient(taken.input.detach(), one) for (path, taken), one in each}
