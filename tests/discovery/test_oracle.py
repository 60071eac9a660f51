"""The trace and the numeric oracle find the same units, family by family."""

from __future__ import annotations

import pytest
from tests.discovery.graphs import graph_of, unit_sets
from tests.discovery.oracle import Oracle
from tests.families import EVERY, build

from saap.core.records import Role

# Heads that leave together though numbers alone tell them apart: the module must keep its blocks of equal size.
JOINED = {"codegen": 4}
TRANSPOSED = ("gpt_oss", "llama4_text")
# Its router takes two experts whatever its attributes say, so some never have a part.
UNTOLD = ("phimoe",)


@pytest.mark.parametrize("family", [family for family in EVERY if family not in UNTOLD])
def test_the_same_units_are_found_by_numbers_alone(family: str) -> None:
    graph = graph_of(family)
    refused = tuple(f"{refusal.name}." for refusal in graph.refused)
    every = Oracle(build(family), graph.blocks[0], contracted=1 if family in TRANSPOSED else 2).units()
    expected = {unit for unit in every if not any(tensor.startswith(refused) for tensor, _, _ in unit)}
    # Whole experts are no channels that could be told by numbers; they have tests of their own.
    groups = [group for group in graph.in_block(0) if group.role is not Role.EXPERT]
    assert {group.role for group in groups} == {Role.FFN, Role.ATTENTION}
    found = {unit for group in groups for unit in unit_sets(group)}
    if family in JOINED:
        found, joined = found & expected, found - expected
        parts = [[one for one in expected if one <= unit] for unit in joined]
        assert [len(one) for one in parts] == [JOINED[family]] * len(joined)
        found |= {one for unit in parts for one in unit}
    assert found == expected
