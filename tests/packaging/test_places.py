"""Named values that describe a part of the settings, which may not be wanted."""

from __future__ import annotations

from typing import Any

import pytest

from saap.settings.evaluate import EvalRequest
from saap.settings.places import filled, places_of
from saap.settings.registry import RuntimeName


def measure(request: EvalRequest) -> None:
    """A function with these settings."""


KNOWN = {place.path[-1]: [place] for place in places_of(measure)}


@pytest.mark.parametrize("speed", [False, None])
def test_details_of_a_part_that_is_not_wanted_do_not_ask_for_it(speed: bool | None) -> None:
    for given in ({"speed": speed, "runtime": "llama.cpp"}, {"runtime": "llama.cpp", "speed": speed}):
        request: Any = filled(measure, KNOWN, given)["request"]
        assert request.speed is None


def test_details_hold_in_any_order() -> None:
    for given in ({"speed": True, "runtime": "llama.cpp"}, {"runtime": "llama.cpp", "speed": True}):
        request: Any = filled(measure, KNOWN, given)["request"]
        assert request.speed.runtime is RuntimeName.LLAMA_CPP
