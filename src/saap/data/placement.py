"""Where the windows of several sets lie in one text: index arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from saap.core.errors import CalibrationError
from saap.core.records import IntArray

HELD_OUT_SHARE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Windows that one text is to give to the set `name`; see SampleRequest for the fields."""

    name: str
    sequences: int
    length: int
    held_out: bool
    at_least: int

    @property
    def tokens(self) -> int:
        """How many tokens that is."""
        return self.sequences * self.length


def parts_by_weight(count: int, weights: Sequence[int]) -> list[int]:
    """`count` split in proportion to whole `weights`, largest remainders first, earlier ones first among equals."""
    total = sum(weights)
    parts = [count * weight // total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda index: -(count * weights[index] % total))
    for index in by_remainder[: count - sum(parts)]:
        parts[index] += 1
    return parts


def place(text: str, tokens: int, demands: Sequence[Demand], generator: np.random.Generator) -> dict[str, list[int]]:
    """First tokens of all windows, by set.

    text: its name, for errors. tokens: its length. If all demands fit, no two windows overlap and every such
    arrangement is equally likely. Otherwise the held-out sets take the end of the text, and each of the others lies in
    the rest without regard to its fellows. Raises CalibrationError if that is too short as well.
    """
    if sum(demand.tokens for demand in demands) <= tokens:
        return _spread(0, tokens, demands, generator)
    others = [demand for demand in demands if not demand.held_out]
    rest = max((demand.at_least * demand.length for demand in others), default=0)
    held: list[Demand] = []
    for demand in (one for one in demands if one.held_out):
        used = sum(one.tokens for one in held)
        held.append(_fit(text, tokens, tokens - rest - used, demand, demands))
    rest = tokens - sum(demand.tokens for demand in held)
    starts = _spread(rest, tokens, held, generator)
    for demand in others:
        starts |= _spread(0, rest, [_fit(text, tokens, rest, demand, demands)], generator)
    return starts


def share_rows(ids: IntArray, demands: Sequence[Demand], generator: np.random.Generator) -> dict[str, IntArray]:
    """Rows of given token ids (rows, length) dealt to the sets, each cut to windows of its length (see `draw_sets`).

    Raises CalibrationError if there are too few rows for a held-out set and two samples of the others.
    """
    longest = max(demand.length for demand in demands)
    if ids.shape[1] >= 2 * longest:
        pieces = ids.shape[1] // longest
        ids = ids[:, : pieces * longest].reshape(-1, longest)
    lengths = {demand.name: min(demand.length, ids.shape[1]) for demand in demands}
    # Rows shorter than asked: more of them, for as many tokens.
    windows = {demand.name: -(-demand.tokens // lengths[demand.name]) for demand in demands}
    needed = {name: -(-count // (ids.shape[1] // lengths[name])) for name, count in windows.items()}
    order = generator.permutation(len(ids))
    enough = sum(needed.values()) <= len(ids)
    held = [demand.name for demand in demands if demand.held_out]
    for name in held if not enough else ():
        needed[name] = min(needed[name], max(1, len(ids) // (HELD_OUT_SHARE * len(held))))
    rest = len(ids) - sum(needed[name] for name in held)
    if not enough and rest < 2:
        raise CalibrationError(f"the token ids have {len(ids)} rows", f"Give at least {2 + len(held)}")
    taken: dict[str, IntArray] = {}
    used = 0
    for demand in sorted(demands, key=lambda one: not one.held_out):
        shares = not enough and not demand.held_out
        rows = order[-min(rest, needed[demand.name]) :] if shares else order[used : used + needed[demand.name]]
        used += 0 if shares else len(rows)
        length = lengths[demand.name]
        whole = ids.shape[1] // length * length
        taken[demand.name] = ids[rows, :whole].reshape(-1, length)[: windows[demand.name]]
    return taken


def _fit(text: str, tokens: int, room: int, demand: Demand, demands: Sequence[Demand]) -> Demand:
    """The demand, made small enough for `room` tokens."""
    fitting = min(demand.sequences, max(0, room) // demand.length)
    if fitting < demand.at_least:
        raise _too_short(text, tokens, demands)
    return replace(demand, sequences=fitting)


def _too_short(text: str, tokens: int, demands: Sequence[Demand]) -> CalibrationError:
    held = sum(demand.at_least * demand.length for demand in demands if demand.held_out)
    others = [demand.at_least * demand.length for demand in demands if not demand.held_out]
    parts = ", ".join(f"{demand.name} {demand.sequences} x {demand.length}" for demand in demands)
    return CalibrationError(
        f"{text} has {tokens:,} tokens, but at least {held + max(others, default=0):,} are needed ({parts})",
        "Give a longer text, or ask for fewer or shorter samples",
    )


def _spread(first: int, end: int, demands: Sequence[Demand], generator: np.random.Generator) -> dict[str, list[int]]:
    """Non-overlapping windows of all demands at random places of first..end: random order, random gaps."""
    owners = [demand for demand in demands for _ in range(demand.sequences)]
    order = generator.permutation(len(owners))
    free = end - first - sum(demand.tokens for demand in demands)
    gaps = np.sort(generator.integers(0, free + 1, size=len(owners)))
    starts: dict[str, list[int]] = {demand.name: [] for demand in demands}
    taken = first
    for gap, window in zip(gaps, order, strict=True):
        starts[owners[window].name].append(taken + int(gap))
        taken += owners[window].length
    return starts
