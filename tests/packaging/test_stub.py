"""The checked-in stub says what the settings say, and the functions take just these names."""

from __future__ import annotations

import pytest
from scripts.api_stub import STUB, stub

import saap


def test_the_stub_is_current() -> None:
    assert STUB.read_text() == stub(), "run `python scripts/api_stub.py`"


def test_unknown_names_are_a_type_error_that_lists_them() -> None:
    with pytest.raises(TypeError, match=r"prune\(\) takes no argument named prunning_ratio, smples"):
        saap.prune("smollm2", prunning_ratio=0.2, smples=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing a required argument: 'model_or_path'"):
        saap.prune(pruning_ratio=0.2)  # type: ignore[call-arg]


def test_old_names_warn_and_still_work() -> None:
    with (
        pytest.warns(FutureWarning, match="samples is now num_samples"),
        pytest.raises(saap.SaapError, match="no target"),
    ):
        saap.prune("smollm2", samples=20)  # type: ignore[call-arg]


def test_wrong_values_are_named() -> None:
    with pytest.raises(saap.SaapError, match=r"--layout 'unifrom' is unknown\. Did you mean uniform"):
        saap.prune("smollm2", pruning_ratio=0.2, layout="unifrom")
    with pytest.raises(saap.SaapError, match="num_samples and samples mean the same setting"):
        saap.prune("smollm2", pruning_ratio=0.2, num_samples=3, samples=2)  # type: ignore[call-arg]
