"""Processes of a run started by `torchrun` or `accelerate launch`: partition of work, and collectives.

Uses torch.distributed: gloo, and nccl for tensors on CUDA. The launcher ends all processes when one fails; a process
that waits for the failed one gets a ProcessError as soon as the connection closes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from saap.core.errors import ConfigurationError, ProcessError, first_line, out_of_memory

T = TypeVar("T")
ALONE = 2**24
"""Numbers of a tensor from which on it is exchanged alone, in place."""

_PATIENCE = timedelta(days=7)  # a process may search or write for hours while the others wait
_ASSEMBLY = timedelta(minutes=10)
_CLAIM = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of a run; by default only this one. rank: of this process. local: its rank on this machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def found(cls) -> Processes:
        """The processes started by `torchrun` or `accelerate launch`, or only this one. Raises ConfigurationError."""
        initialised = dist.is_available() and dist.is_initialized()
        count = dist.get_world_size() if initialised else _number("WORLD_SIZE", 1)
        if count <= 1:
            return cls()
        rank = dist.get_rank() if initialised else _number("RANK", 0)
        several = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        try:
            if not initialised:
                store, *_ = next(rendezvous("env://", timeout=_ASSEMBLY))
                dist.init_process_group(several, timeout=_PATIENCE, store=store, rank=rank, world_size=count)
        except (ValueError, RuntimeError) as error:
            raise ConfigurationError(
                f"WORLD_SIZE is {count}, but the processes cannot connect to each other ({error})",
                "Start them with torchrun or accelerate launch",
            ) from None
        return cls(rank, count, _number("LOCAL_RANK", rank))

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def device(self, chosen: torch.device) -> torch.device:
        """Device of this process: on CUDA each process has its own device. Raises ConfigurationError."""
        if self.count == 1 or chosen.type != "cuda":
            return chosen
        if self.local >= torch.cuda.device_count():
            raise ConfigurationError(
                f"Process {self.local + 1} of this machine has no device of its own, {torch.cuda.device_count()} exist",
                "Start as many processes as there are devices, or use --device cpu",
            )
        torch.cuda.set_device(self.local)
        return torch.device("cuda", self.local)

    def share(self, items: int) -> range:
        """Indices of the items of this process: contiguous equal parts, the first ones one longer."""
        each, more = divmod(items, self.count)
        start = self.rank * each + min(self.rank, more)
        return range(start, start + each + (self.rank < more))

    def total(self, values: Tensor) -> Tensor:
        """Sum of the tensor over all processes, the same in each; the tensor itself may be overwritten."""
        return self._exchanged(dist.all_reduce, values)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the sum over all processes: small ones in one exchange, as it needs a copy of them."""
        if self.count == 1:
            return
        for one in tensors:
            if one.numel() >= ALONE:
                one.copy_(self.total(one))
        small = [one for one in tensors if one.numel() < ALONE]
        if small:
            vector_to_parameters(self.total(parameters_to_vector(small)), small)

    def broadcast(self, values: Tensor) -> Tensor:
        """Broadcast the first process' tensor; those of the others define the shape and may be overwritten."""
        return self._exchanged(partial(dist.broadcast, src=0), values)

    def _exchanged(self, operation: Callable[[Tensor], Any], values: Tensor) -> Tensor:
        if self.count == 1:
            return values
        sent = (values if values.device.type in ("cpu", "cuda") else values.cpu()).contiguous()
        _exchange(operation, sent)
        return sent.to(values.device)

    def broadcast_result(self, make: Callable[[], T]) -> T:
        """Broadcast the result of `make`, which only the first process calls."""
        made: Any = make() if self.first else None
        result: T = self.gather(made)[0]
        return result

    def gather(self, part: T) -> list[T]:
        """The parts of all processes by rank, the same in each."""
        if self.count == 1:
            return [part]
        parts: list[Any] = [None] * self.count
        _exchange(dist.all_gather_object, parts, part)
        return parts

    def barrier(self) -> None:
        """Barrier: wait for all processes."""
        self.total(torch.zeros(1))


def first_to_fail() -> bool:
    """Whether this process is the first of its run to call this, and so reports the error for all."""
    try:
        store, *_ = next(rendezvous("env://", timeout=_CLAIM))
        order: int = store.add("saap/failed", 1)
    except (ValueError, RuntimeError):  # no other processes, or the store ended with the first process
        return os.environ.get("RANK", "0") == "0"
    return order == 1


def _number(variable: str, default: int) -> int:
    try:
        return int(os.environ.get(variable, default))
    except ValueError:
        raise ConfigurationError(
            f"The environment variable {variable} is not a number", "Unset it, or start with torchrun"
        ) from None


def _exchange(operation: Callable[..., Any], *arguments: Any) -> None:
    try:
        operation(*arguments)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise ProcessError(
            f"Another process of this run has ended ({first_line(error)})",
            "See its message, if any; the same command resumes from the last finished stage",
        ) from None
