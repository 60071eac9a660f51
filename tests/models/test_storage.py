from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saap.core.errors import PlanError, StaleInputError
from saap.core.records import (
    AxisSlice,
    Candidate,
    CoupledGroup,
    GroupScores,
    ImportanceScores,
    Layout,
    ModelGraph,
    ModelRef,
    Role,
    Side,
    StructurePlan,
    UnitScores,
)
from saap.core.storage import (
    format_units,
    parse_units,
    read_plan,
    read_scores,
    write_plan,
    write_scores,
)
from saap.structure_search.plan import complete_plan, make_plan


def tiny_graph() -> ModelGraph:
    def group(layer: int) -> CoupledGroup:
        up = AxisSlice(tensor=f"b.{layer}.up", axis=0, side=Side.PRODUCER, offset=0, width=1, stride=1)
        down = AxisSlice(tensor=f"b.{layer}.down", axis=1, side=Side.CONSUMER, offset=0, width=1, stride=1)
        name = f"layers.{layer}.ffn"
        return CoupledGroup(layer=layer, role=Role.FFN, name=name, units=10, members=(up, down))

    return ModelGraph(
        model=ModelRef(source="here", config_digest="c", weights_digest="w"),
        blocks=("b.0", "b.1"),
        groups=(group(0), group(1)),
        shapes={f"b.{layer}.{name}": shape for layer in (0, 1) for name, shape in (("up", (10, 3)), ("down", (3, 10)))},
    )


def tiny_plan(graph: ModelGraph) -> StructurePlan:
    keep = {"layers.0.ffn": (0, 1, 2, 5, 7)}
    trail = (Candidate(name="uniform", loss=0.5),)
    return make_plan(graph, keep, (), layout=Layout.ADAPTIVE, strategy="adaptive", align=1, trail=trail)


def edited(path: Path, **entry: object) -> Path:
    document = json.loads(path.read_text())
    document["groups"]["layers.0.ffn"] = entry
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    graph = tiny_graph()
    write_plan(tmp_path / "plan.json", tiny_plan(graph), graph)
    return tmp_path / "plan.json"


def test_a_plan_is_readable_and_comes_back(plan_file: Path) -> None:
    graph = tiny_graph()
    entry = json.loads(plan_file.read_text())["groups"]["layers.0.ffn"]
    assert entry == {"kept": 5, "of": 10, "units": "0-2,5,7"}
    read = complete_plan(graph, read_plan(plan_file, graph))
    assert read == tiny_plan(graph)


def test_a_count_alone_is_left_to_the_scores(plan_file: Path) -> None:
    graph = tiny_graph()
    read = read_plan(edited(plan_file, kept=4), graph)
    assert read.keep(graph)["layers.0.ffn"] == 4
    with pytest.raises(PlanError, match=r"layers\.0\.ffn are still to be chosen"):
        complete_plan(graph, read)
    scores = {"layers.0.ffn": UnitScores(mean=np.arange(10.0), variance=np.zeros(10))}
    plan = complete_plan(graph, read, scores)
    assert plan.keep["layers.0.ffn"] == (6, 7, 8, 9)
    assert plan.parameters == 6 * 4 + 6 * 10


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ({"kept": 4, "units": "0-2,5,7"}, "kept is 4 but 5 units are listed"),
        ({"kept": 11}, "kept 11 of 10"),
        ({"units": "0-10"}, "unit 10 of 10"),
        ({"units": "3,3"}, "ascending"),
        ({"units": "3-x"}, "neither a unit nor a run"),
        ({"kept": 2, "of": 12}, "10 units, not 12"),
        ({}, "neither"),
        ({"kept": -1}, "greater than or equal to 0"),
        ({"keep": 3}, "keep"),
    ],
)
def test_faults_of_an_edited_plan_are_named(plan_file: Path, entry: dict[str, object], fault: str) -> None:
    with pytest.raises(PlanError, match=fault):
        read_plan(edited(plan_file, **entry), tiny_graph())


def test_a_plan_of_another_model_is_refused(plan_file: Path) -> None:
    document = json.loads(plan_file.read_text())
    document["groups"]["layers.7.ffn"] = {"kept": 1}
    document["dropped_blocks"] = [5]
    plan_file.write_text(json.dumps(document))
    with pytest.raises(PlanError, match=r"layers\.7\.ffn: the model has no such group; no block 5"):
        read_plan(plan_file, tiny_graph())


def test_a_missing_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"plan\.json cannot be read"):
        read_plan(tmp_path / "plan.json", tiny_graph())


@given(st.sets(st.integers(0, 300)))
def test_runs_of_units_come_back(units: set[int]) -> None:
    ascending = tuple(sorted(units))
    assert parse_units(format_units(ascending)) == ascending


def test_scores_come_back_bit_by_bit(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    statistics = {name: generator.normal(size=7) for name in GroupScores.__dataclass_fields__}
    scores = ImportanceScores(
        graph_digest="g",
        calibration_digest="c",
        samples=3,
        element_order="2",
        aggregation="sum",
        losses=generator.normal(size=3),
        groups={"layers.1.ffn": GroupScores(**statistics), "layers.0.ffn": GroupScores(**statistics)},
    )
    write_scores(tmp_path / "scores.safetensors", scores)
    read = read_scores(tmp_path / "scores.safetensors")
    assert read.digest == scores.digest
    assert list(read.groups) == list(scores.groups)
    (tmp_path / "scores.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(StaleInputError, match="has no scores"):
        read_scores(tmp_path / "scores.safetensors")
