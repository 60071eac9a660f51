"""What methods want to know of a model while it runs: observers, and the hooks that show them linear modules."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import Any, Protocol

from torch import Tensor, nn

from saap.core.errors import UnsupportedModelError
from saap.models.walk.processes import Processes


class Signal(Flag):
    """What can be observed of a module, or (the last) of a weight."""

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
        """Tokens of a sample that its loss is the mean over."""
        return self.tokens.shape[1] - 1

    def by_sample(self, activation: Tensor, site: str) -> Tensor:
        """View an activation as (samples, tokens, channels). Raises UnsupportedModelError where samples are mixed."""
        samples, length = self.tokens.shape
        if activation.dim() >= 3 and activation.shape[0] == samples:
            return activation.reshape(samples, -1, activation.shape[-1])
        if activation.dim() == 2 and activation.shape[0] == samples * length:
            return activation.reshape(samples, length, activation.shape[-1])
        if samples == 1:
            return activation.reshape(1, -1, activation.shape[-1])
        raise UnsupportedModelError(
            f"{site} sees tokens of {samples} samples mixed in a tensor of shape {tuple(activation.shape)}",
            "Score one sample at a time (micro_batch=1)",
        )


@dataclass(slots=True)
class Observation:
    """One call of a module for a micro-batch. Only the signals that someone needs are set.

    x, y: its input and output, (..., channels). dx, dy: gradients of each sample's own loss at them; dx is that through
    this module alone. dw: gradient of a weight, a sum over the samples.
    """

    site: str
    batch: Batch
    x: Tensor = field(init=False)
    y: Tensor = field(init=False)
    dy: Tensor = field(init=False)
    dx: Tensor = field(init=False)
    dw: Tensor = field(init=False)


class Observer(Protocol):
    """Reduces what it is shown in a walk to its result. `merge` is called once, after the last micro-batch."""

    needs: Needs

    @abstractmethod
    def observe(self, seen: Observation) -> None:
        """Take in one call of a site in `needs`; its tensors are valid for as long as this takes."""

    @abstractmethod
    def merge(self, processes: Processes) -> None:
        """Combine with what the observers of the other processes have seen."""

    @abstractmethod
    def result(self) -> Any:
        """What was found."""

    def observe_loss(self, batch: Batch, losses: Tensor) -> None:
        """Take in the loss of each sample, (samples,), before the way back."""
        return

    def leave_block(self, layer: int, batch: Batch) -> None:
        """Called once a micro-batch has gone back through a block."""
        return

    def close_block(self, layer: int) -> None:
        """Called once all samples have gone back through a block, its weights being in memory; with a spill only."""
        return


Show = Callable[[Observation], None]


@contextmanager
def showing(model: nn.Module, needs: Needs, batch: Batch, show: Show) -> Iterator[None]:
    """Hooks on the modules of one block; inside the context the block runs once, forward and back."""
    watched, handles = [], []
    try:
        for path, signals in needs.items():
            module, one = model.get_submodule(path), _Watched(path, signals, batch, show)
            watched.append(one)
            handles.append(module.register_forward_pre_hook(one.before))
            handles.append(module.register_forward_hook(one.after))
        yield
        for one in watched:
            one.finish()
    finally:
        for handle in handles:
            handle.remove()


@dataclass(slots=True)
class _Watched:
    """One module, watched while its block runs. An observation is shown when the last needed signal has come."""

    path: str
    signals: Signal
    batch: Batch
    show: Show
    _seen: Observation | None = None
    _runs: int = 0
    _version: int = 0

    def before(self, module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook. The input goes on as an alias, whose gradient is that of this module alone."""
        self._runs += 1
        if self._runs > 1:
            raise UnsupportedModelError(
                f"{self.path} runs twice in one forward, so its gradient is not that of one call",
                "Leave out the role it belongs to with --roles",
            )
        self._seen = Observation(self.path, self.batch)
        self._seen.x = arguments[0].detach()
        if Signal.INPUT_GRADIENT not in self.signals:
            return arguments
        alias = arguments[0].view_as(arguments[0])
        alias.register_hook(self._on_input_gradient)
        return (alias, *arguments[1:])

    def after(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook."""
        if self._seen is not None and Signal.OUTPUT in self.signals:
            self._seen.y, self._version = output.detach(), output._version
        output.register_hook(self._on_output_gradient)  # type: ignore[no-untyped-call]

    def finish(self) -> None:
        """After the way back. Raises UnsupportedModelError if the module ran but its gradients are missing."""
        if self._seen is not None:
            raise UnsupportedModelError(
                f"The output of {self.path} is changed in place or not used, so its gradient cannot be seen",
                "Use operations that make new tensors, or leave out the role it belongs to with --roles",
            )

    def _on_output_gradient(self, gradient: Tensor) -> None:
        seen = self._seen
        if seen is None or (Signal.OUTPUT in self.signals and seen.y._version != self._version):
            return
        seen.dy = gradient
        if Signal.INPUT_GRADIENT not in self.signals:
            self._complete(seen)

    def _on_input_gradient(self, gradient: Tensor) -> None:
        if self._seen is not None and hasattr(self._seen, "dy"):
            self._seen.dx = gradient
            self._complete(self._seen)

    def _complete(self, seen: Observation) -> None:
        self._seen = None
        self.show(seen)
