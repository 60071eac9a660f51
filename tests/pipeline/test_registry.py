"""Every registered name stands for code that is there."""

from __future__ import annotations

import pytest

from saap.baselines.baseline import Baseline
from saap.estimation.importance import Scoring
from saap.settings.registry import Importance, Method, Registered, Strategy


@pytest.mark.parametrize("name", [*Importance, *Strategy, *Method])
def test_a_name_has_code_and_a_summary(name: Registered) -> None:
    kind = {Importance: Scoring, Method: Baseline}.get(type(name))
    code = name.load()
    assert callable(code) if kind is None or name is Method.SAAP else isinstance(code, kind)
    assert name.summary
    assert type(name)(str(name)) is name
