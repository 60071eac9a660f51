"""Reading the values of flags: each function gives the value or one sentence that says what is legal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from enum import StrEnum
from typing import TypeVar

from saap.core.errors import ConfigurationError
from saap.settings.prune import MethodChoice, PrunableRole, SkipLayers, check_seed
from saap.settings.registry import Method

Choice = TypeVar("Choice", bound=StrEnum)

_COUNT_UNITS: Mapping[str, int] = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
_BYTE_UNITS: Mapping[str, int] = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30,
}  # fmt: skip


def _scaled(flag: str, text: str, units: Mapping[str, int], example: str) -> int:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in units:
        raise ConfigurationError(f"{flag} {text!r} is not a number with a unit", f"Write it like {example}")
    return round(float(match[1]) * units[match[2].upper()])


def parse_count(flag: str, text: str) -> int:
    """A number of parameters: 100M, 1.5B, 90000000. Raises ConfigurationError."""
    return _scaled(flag, text, _COUNT_UNITS, "100M")


def parse_bytes(flag: str, text: str) -> int:
    """A size: 80MB, 1.5GiB, 80000000. Raises ConfigurationError."""
    return _scaled(flag, text, _BYTE_UNITS, "80MB")


def parse_ratios(text: str, flag: str = "--pruning-ratio") -> tuple[float, ...]:
    """One pruning ratio or several, separated by commas. Raises ConfigurationError."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigurationError(
            f"{flag} {text!r} is not a number", "Write a fraction like 0.2, or several like 0.1,0.2,0.3"
        ) from None


def parse_roles(text: str) -> tuple[PrunableRole, ...]:
    """Roles separated by commas. Raises ConfigurationError."""
    return tuple(choice("--roles", part.strip(), PrunableRole) for part in text.split(",") if part.strip())


def parse_methods(text: str) -> tuple[MethodChoice, ...]:
    """Methods separated by commas, each with roles of its own if it says so: saap,flap,llm-pruner-vector@ffn.

    Raises ConfigurationError.
    """
    chosen = []
    for part in (part.strip() for part in text.split(",")):
        name, mark, roles = part.partition("@")
        of_its_own = tuple(choice("--methods", role, PrunableRole) for role in roles.split("+")) if mark else None
        chosen.append(MethodChoice(method=choice("--methods", name, Method), roles=of_its_own))
    if len(set(chosen)) < len(chosen):
        raise ConfigurationError(f"--methods {text!r} names one twice", "Name each once")
    return tuple(chosen)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds separated by commas. Raises ConfigurationError."""
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigurationError(f"--seeds {text!r} are not whole numbers", "Write them like 0,1,2") from None
    for seed in seeds:
        check_seed(seed)
    if len(set(seeds)) < len(seeds):
        raise ConfigurationError(f"--seeds {text!r} names one twice", "Name each once")
    return seeds


def parse_skip_layers(text: str) -> SkipLayers | None:
    """`auto` (None: the search decides), or `first:4,last:2`. Raises ConfigurationError."""
    if text.strip() == "auto":
        return None
    ends: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(first|last):([0-9]+)\s*", part)
        if match is None or match[1] in ends:
            raise ConfigurationError(
                f"--skip-layers {text!r} is not understood", "Write `auto` or e.g. `first:4,last:2`"
            )
        ends[match[1]] = int(match[2])
    return SkipLayers(**ends)


def choice(flag: str, text: str, kind: type[Choice]) -> Choice:
    """A member of `kind` by its value. Raises ConfigurationError that offers near names."""
    try:
        return kind(text)
    except ValueError:
        names: Sequence[str] = [member.value for member in kind]
        near = get_close_matches(text, names, n=1)
        hint = f"Did you mean {near[0]}? It takes" if near else "It takes"
        raise ConfigurationError(f"{flag} {text!r} is unknown", f"{hint} {', '.join(names)}") from None
