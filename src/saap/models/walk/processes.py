"""Several processes that work on one run: each takes a part, sums make the parts one, and the failure of one ends all.

They are started by `torchrun` or `accelerate launch`, and speak through torch.distributed: gloo, and nccl for tensors
on CUDA. Every exchange begins with a barrier. A process that fails goes to the next barrier and says why, so that
nobody waits for it and all end with the same message.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from saap.core.errors import ConfigurationError, ProcessError, SaapError

T = TypeVar("T")

# A process may search or write for hours while the others wait; one that died is noticed by its closed connection.
_PATIENCE = timedelta(days=7)
_ASSEMBLY = timedelta(minutes=10)
_SHUTDOWN = timedelta(seconds=5)


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of a run; the default is this one alone. rank: number of this one. local: among its machine's."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def found(cls) -> Processes:
        """Those that `torchrun` or `accelerate launch` started, or this one alone. Raises ConfigurationError."""
        if dist.is_available() and dist.is_initialized():
            count, rank = dist.get_world_size(), dist.get_rank()
        else:
            count, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
            if count > 1:
                _begin(rank, count)
        return cls(rank, count, _number("LOCAL_RANK", rank)) if count > 1 else cls()

    @property
    def first(self) -> bool:
        """Whether this one writes files and speaks."""
        return self.rank == 0

    def device(self, chosen: torch.device) -> torch.device:
        """Where this process computes: of several on CUDA each has its own device. Raises ConfigurationError."""
        if self.count == 1 or chosen.type != "cuda":
            return chosen
        if self.local >= torch.cuda.device_count():
            raise ConfigurationError(
                f"Process {self.local + 1} of this machine has no CUDA device of its own, there are "
                f"{torch.cuda.device_count()}",
                "Start as many processes as there are devices, or use --device cpu",
            )
        torch.cuda.set_device(self.local)
        return torch.device("cuda", self.local)

    def share(self, items: int) -> range:
        """The numbers of the items that are this process' part: equal parts in order, the first ones one longer."""
        each, more = divmod(items, self.count)
        start = self.rank * each + min(self.rank, more)
        return range(start, start + each + (self.rank < more))

    def total(self, values: Tensor) -> Tensor:
        """Sum of the tensor over all processes, the same in each; the tensor itself may be overwritten."""
        return self._exchanged(values, dist.all_reduce)

    def broadcast(self, values: Tensor) -> Tensor:
        """The first one's tensor, in each; those of the others are only of its shape and may be overwritten."""
        return self._exchanged(values, dist.broadcast, 0)

    def _exchanged(self, values: Tensor, operation: Callable[..., Any], *arguments: int) -> Tensor:
        if self.count == 1:
            return values
        self.wait()
        # in one piece, and on a device that the exchange can read
        reachable = (values if values.device.type in ("cpu", "cuda") else values.cpu()).contiguous()
        _exchange(operation, reachable, *arguments)
        return reachable.to(values.device)

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, where alone it is called."""
        made: list[Any] = [make() if self.first else None]
        if self.count > 1:
            self.wait()
            _exchange(dist.broadcast_object_list, made, 0)
        result: T = made[0]
        return result

    def gathered(self, part: T) -> list[T]:
        """The parts of all processes by rank, the same in each."""
        if self.count == 1:
            return [part]
        self.wait()
        parts: list[Any] = [None] * self.count
        _exchange(dist.all_gather_object, parts, part)
        return parts

    def wait(self) -> None:
        """Until all are here. If one of them has failed, this process ends with its message."""
        if self.count > 1 and _barrier(failed=False):
            raise _EndedElsewhereError(_first_failure(self, None))


class _EndedElsewhereError(Exception):
    """Carries the error of another process past everything that handles errors of this one."""

    def __init__(self, error: SaapError) -> None:
        super().__init__(error)
        self.error = error


@contextmanager
def together() -> Iterator[None]:
    """Everything inside fails in all processes if it fails in one.

    A process that did not fail itself raises the error of the first one that did; of an error that is no SaapError it
    raises ProcessError. Must not be nested.
    """
    try:
        yield
        if dist.is_available() and dist.is_initialized():
            Processes.found().wait()
    except _EndedElsewhereError as ended:
        raise ended.error from None
    except Exception as own:
        with suppress(_EndedElsewhereError, ConfigurationError):  # the others may have ended already
            processes = Processes.found()
            if processes.count > 1:
                _barrier(failed=True)
                _first_failure(processes, own)
        raise


def end_together() -> None:
    """Wait until all processes that are left have come to their end."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(torch.zeros(1), async_op=True).wait(_SHUTDOWN)


def _number(variable: str, default: int) -> int:
    try:
        return int(os.environ.get(variable, default))
    except ValueError:
        raise ConfigurationError(
            f"The environment variable {variable} is no number", "Unset it, or start with torchrun"
        ) from None


def _begin(rank: int, count: int) -> None:
    several = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, *_ = next(rendezvous("env://", timeout=_ASSEMBLY))
        dist.init_process_group(several, timeout=_PATIENCE, store=store, rank=rank, world_size=count)
    except (ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"WORLD_SIZE says that there are {count} processes, but they do not find each other ({error})",
            "Start them with torchrun or accelerate launch",
        ) from None


def _barrier(*, failed: bool) -> bool:
    """Whether any process has failed."""
    failures = torch.tensor([int(failed)])
    _exchange(dist.all_reduce, failures)
    return bool(failures.item())


def _first_failure(processes: Processes, own: Exception | None) -> SaapError:
    reports: list[Any] = [None] * processes.count
    _exchange(dist.all_gather_object, reports, None if own is None else _told(processes.rank, own))
    failures: list[SaapError] = [report for report in reports if report is not None]
    return failures[0]


def _told(rank: int, error: Exception) -> SaapError:
    """The error as others can be told of it."""
    if isinstance(error, SaapError):
        with suppress(Exception):  # one that cannot be sent is told in words
            pickle.dumps(error)
            return error
    return ProcessError(
        f"Process {rank} failed ({type(error).__name__}: {error})",
        "See its own message; the same command goes on from the last finished stage",
    )


def _exchange(operation: Callable[..., Any], *arguments: Any) -> None:
    try:
        operation(*arguments)
    except RuntimeError as error:
        raise _EndedElsewhereError(
            ProcessError(
                f"Another process of this run has ended ({str(error).splitlines()[0]})",
                "See what it said, if anything; the same command goes on from the last finished stage",
            )
        ) from None
