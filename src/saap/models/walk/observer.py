"""Observers, which reduce the activations and gradients of a walk, and the hooks that provide them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import Flag, auto
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from saap.core.errors import UnsupportedModelError
from saap.core.records import FloatArray
from saap.models.walk.processes import Processes


class Signal(Flag):
    """Observable signals of a module, or (the last) of a weight."""

    INPUT = auto()
    OUTPUT = auto()
    OUTPUT_GRADIENT = auto()
    INPUT_GRADIENT = auto()
    WEIGHT_GRADIENT = auto()


Needs = Mapping[str, Signal]
"""Signals by site: the path of a module, for the last signal the name of a weight, and forward also that of a block."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch. tokens: (samples, length) ids. first: number of its first sample."""

    tokens: Tensor
    first: int = 0

    @property
    def predictions(self) -> int:
        """Number of predicted tokens in the mean loss of a sample."""
        return self.tokens.shape[1] - 1

    def by_sample(self, activation: Tensor, site: str) -> Tensor:
        """View an activation as (samples, tokens, channels). Raises UnsupportedModelError if samples are mixed."""
        samples, length = self.tokens.shape
        whole = activation.dim() >= 3 and activation.shape[0] == samples
        flat = activation.dim() == 2 and activation.shape[0] == samples * length
        if not (whole or flat or samples == 1):
            raise UnsupportedModelError(
                f"{site} sees tokens of {samples} samples mixed in a tensor of shape {tuple(activation.shape)}",
                "Use --sample-length 256 or more",
            )
        return activation.reshape(samples, length if flat else -1, activation.shape[-1])


class Observation(SimpleNamespace):
    """One call of a module for a micro-batch. Only the needed signals are set.

    x, y: its input and output, (..., channels). arguments: all positional ones, in a forward walk. dx, dy: gradients of
    x and y for each sample's own loss; dx only through this module. dw: gradient of a weight, a sum over the samples.
    """

    site: str
    batch: Batch
    x: Tensor
    y: Tensor
    arguments: tuple[Any, ...]
    dy: Tensor
    dx: Tensor
    dw: Tensor


class Observer(Protocol):
    """Reduces the observations of a walk to a result. `merge` is called once, after the last micro-batch."""

    needs: Needs

    @abstractmethod
    def observe(self, seen: Observation) -> None:
        """Process one call of a site in `needs`; its tensors are valid only during this call."""

    @abstractmethod
    def merge(self, processes: Processes) -> None:
        """Combine with the observers of the other processes."""

    def state(self) -> Mapping[str, FloatArray] | None:
        """What it has found so far, between two blocks; None if it cannot be restored."""
        return None

    def restore(self, state: Mapping[str, FloatArray]) -> None:
        """Continue from what another one had found."""
        return

    def observe_loss(self, batch: Batch, losses: Tensor) -> None:
        """Process the loss of each sample, (samples,), before the backward pass."""
        return

    def leave_block(self, layer: int, batch: Batch) -> None:
        """Called after the backward pass of a micro-batch through a block."""
        return

    def close_block(self, layer: int) -> None:
        """Called after the backward pass of all samples through a block whose weights are in memory (spill only)."""
        return


Show = Callable[[Observation], None]


@contextmanager
def hooked(hooks: Mapping[nn.Module, Callable[..., Any]], *, before: bool = False, **options: bool) -> Iterator[None]:
    """Context with forward hooks on modules. before: use pre-hooks. options: for the registration."""
    with ExitStack() as stack:
        for module, hook in hooks.items():
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(hook, **options).remove)
        yield


class Capture(NamedTuple):
    """Input and output of a module at one call, (sequences, tokens, channels), and its positional arguments."""

    input: Tensor
    output: Tensor
    arguments: tuple[Any, ...]


class StopForwardError(Exception):
    """Ends a forward, of a block or a model, once what is of interest has run."""


@contextmanager
def capture(model: nn.Module, paths: Sequence[str], *, stop: bool = False) -> Iterator[dict[str, Capture]]:
    """Record input and output of the modules at `paths`, in execution order.

    stop: abort the forward pass after the first of them (the `with` body ends there).
    """
    seen: dict[str, Capture] = {}

    def record(path: str, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        seen[path] = Capture(arguments[0], output, arguments)
        if stop:
            raise StopForwardError

    with suppress(StopForwardError), hooked({model.get_submodule(path): partial(record, path) for path in paths}):
        yield seen


@contextmanager
def observing_gradients(model: nn.Module, needs: Needs, batch: Batch, show: Show) -> Iterator[None]:
    """Pass observations of modules to `show`; inside the context the block runs once, forward and backward.

    Raises UnsupportedModelError for a module that ran twice, or whose gradients are missing.
    """
    ran: set[str] = set()
    entries: dict[str, Tensor] = {}
    pending: dict[str, Observation] = {}  # until their gradients are known

    def before(path: str, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if path in ran:
            raise UnsupportedModelError(
                f"{path} runs twice in one forward, so its gradient is not that of one call",
                "Leave out the role it belongs to with --roles",
            )
        ran.add(path)
        pending[path] = Observation(site=path, batch=batch, x=arguments[0].detach())
        if Signal.INPUT_GRADIENT not in needs[path]:
            return arguments
        entries[path] = arguments[0].view_as(arguments[0])  # an alias, whose gradient is only that through this module
        return (entries[path], *arguments[1:])

    def after(path: str, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        if Signal.OUTPUT in needs[path]:
            pending[path].y = output.detach()
        watched = [output, entries.pop(path)] if path in entries else [output]
        hook = register_multi_grad_hook(watched, partial(complete, pending[path], output._version))
        hooks.callback(hook.remove)  # otherwise the hook and the graph of the block keep each other alive

    def complete(seen: Observation, version: int, gradients: Sequence[Tensor | None]) -> None:
        found = [gradient for gradient in gradients if gradient is not None]
        changed = Signal.OUTPUT in needs[seen.site] and seen.y._version != version
        if changed or len(found) < len(gradients):
            return
        vars(seen).update(zip(("dy", "dx"), found, strict=False))
        del pending[seen.site]
        show(seen)

    modules = {path: model.get_submodule(path) for path in needs}
    with (
        ExitStack() as hooks,
        hooked({module: partial(before, path) for path, module in modules.items()}, before=True),
        hooked({module: partial(after, path) for path, module in modules.items()}),
    ):
        yield
    if pending:
        raise UnsupportedModelError(
            f"The output of {next(iter(pending))} is changed in place or not used, so its gradient cannot be observed",
            "Use out-of-place operations, or leave out the role it belongs to with --roles",
        )
