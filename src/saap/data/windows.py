"""Placement of the windows of several sets in one text: index arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from saap.core.errors import CalibrationError
from saap.core.records import IntArray

HELD_OUT_SHARE = 4


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """A requested set: `sequences` windows of `length` tokens.

    held_out: its tokens are never in another set; other sets share tokens if the text is too short for all. at_least:
    accept this many sequences if the text is too short for more; None requires `sequences`.
    """

    name: str
    sequences: int
    length: int
    held_out: bool = False
    at_least: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return self.sequences * self.length

    @property
    def least(self) -> int:
        """Minimum number of sequences."""
        return self.sequences if self.at_least is None else min(self.at_least, self.sequences)

    def part(self, sequences: int) -> SampleRequest:
        """The part of the request that one of several texts provides, of `sequences`."""
        share = -(-self.least * sequences // max(1, self.sequences))
        return replace(self, sequences=sequences, at_least=share)


def parts_by_weight(count: int, weights: Sequence[int]) -> list[int]:
    """`count` split in proportion to whole `weights`, largest remainders first, earlier ones first among equals."""
    total = sum(weights)
    parts = [count * weight // total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda index: -(count * weights[index] % total))
    for index in by_remainder[: count - sum(parts)]:
        parts[index] += 1
    return parts


def place(
    text: str, tokens: int, requests: Sequence[SampleRequest], generator: np.random.Generator
) -> dict[str, list[int]]:
    """First tokens of all windows, by set.

    text: its name, for errors. tokens: its length. If all requests fit, no two windows overlap and every such
    arrangement is equally likely. Otherwise the held-out sets take the end of the text, and the other sets are placed
    independently in the rest. Raises CalibrationError if that is too short as well.
    """
    if sum(request.tokens for request in requests) <= tokens:
        return _spread(0, tokens, requests, generator)
    least = {request.name: request.least * request.length for request in requests}
    shared = max((least[request.name] for request in requests if not request.held_out), default=0)

    def fitted(request: SampleRequest, room: int) -> SampleRequest:
        fitting = min(request.sequences, max(0, room) // request.length)
        if fitting < request.least:
            needed = shared + sum(least[request.name] for request in requests if request.held_out)
            parts = ", ".join(f"{request.name} {request.sequences} x {request.length}" for request in requests)
            raise CalibrationError(
                f"{text} has {tokens:,} tokens, but at least {needed:,} are needed ({parts})",
                "Give a longer text, or request fewer or shorter samples",
            )
        return replace(request, sequences=fitting)

    held: list[SampleRequest] = []
    rest, reserved = tokens, shared + sum(least[request.name] for request in requests if request.held_out)
    for request in (one for one in requests if one.held_out):
        reserved -= least[request.name]  # what is left is the least of the later ones and of the sets that share
        held.append(fitted(request, rest - reserved))
        rest -= held[-1].tokens
    starts = _spread(rest, tokens, held, generator)
    for request in (one for one in requests if not one.held_out):
        starts |= _spread(0, rest, [fitted(request, rest)], generator)
    return starts


def share_rows(
    ids: IntArray, requests: Sequence[SampleRequest], generator: np.random.Generator, of: str = "rows of token ids"
) -> dict[str, IntArray]:
    """Rows of given token ids (rows, length) dealt to the sets, each cut to windows of its length (see `draw_sets`).

    of: what the rows are, for errors.
    Raises CalibrationError if there are too few rows for a held-out set and two samples of the others.
    """
    longest = max(request.length for request in requests)
    if ids.shape[1] >= 2 * longest:
        pieces = ids.shape[1] // longest
        ids = ids[:, : pieces * longest].reshape(-1, longest)
    lengths = {request.name: min(request.length, ids.shape[1]) for request in requests}
    # Rows shorter than requested: more of them, for as many tokens.
    windows = {request.name: -(-request.tokens // lengths[request.name]) for request in requests}
    needed = {name: -(-count // (ids.shape[1] // lengths[name])) for name, count in windows.items()}
    order = generator.permutation(len(ids))
    enough = sum(needed.values()) <= len(ids)
    held = [request.name for request in requests if request.held_out]
    rest = len(ids)
    for name in held:
        if not enough:
            needed[name] = min(needed[name], max(1, len(ids) // (HELD_OUT_SHARE * len(held))))
        rest -= needed[name]
    if not enough and rest < 2:
        raise CalibrationError(f"there are only {len(ids)} {of}", f"Give at least {2 + len(held)}")
    taken: dict[str, IntArray] = {}
    used = 0
    for name in (*held, *(name for name in needed if name not in held)):
        if enough or name in held:
            rows = order[used : used + needed[name]]
            used += len(rows)
        else:
            rows = order[-min(rest, needed[name]) :]
        whole = ids.shape[1] // lengths[name] * lengths[name]
        taken[name] = ids[rows, :whole].reshape(-1, lengths[name])[: windows[name]]
    return taken


def _spread(
    first: int, end: int, requests: Sequence[SampleRequest], generator: np.random.Generator
) -> dict[str, list[int]]:
    """Non-overlapping windows of all requests at random places of first..end: random order, random gaps."""
    owners = [request for request in requests for _ in range(request.sequences)]
    order = generator.permutation(len(owners))
    free = end - first - sum(request.tokens for request in requests)
    gaps = np.sort(generator.integers(0, free + 1, size=len(owners)))
    starts: dict[str, list[int]] = {request.name: [] for request in requests}
    taken = first
    for gap, window in zip(gaps, order, strict=True):
        starts[owners[window].name].append(taken + int(gap))
        taken += owners[window].length
    return starts
