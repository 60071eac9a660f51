"""The trace and the numeric oracle find the same units, family by family."""

from __future__ import annotations

import pytest
from tests.discovery.graphs import graph_of, unit_sets
from tests.discovery.oracle import Oracle
from tests.families import FAMILIES, build

from saap.records import Role


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_units_are_found_by_numbers_alone(family: str) -> None:
    graph = graph_of(family)
    expected = Oracle(build(family), graph.blocks[0]).units()
    groups = graph.in_block(0)
    assert {group.role for group in groups} == {Role.FFN, Role.ATTENTION}
    assert {unit for group in groups for unit in unit_sets(group)} == expected
