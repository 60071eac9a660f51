"""An interrupted walk of offloaded weights resumes at the block that it had reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import families

from saap.core.errors import StaleInputError
from saap.core.records import CalibrationSet, ImportanceScores, ModelGraph, Role
from saap.discovery import discover
from saap.estimation.estimate import estimate
from saap.models.walk.backend import Backend
from saap.models.walk.finished import NAME, read_finished
from saap.models.walk.spill import Spill
from saap.models.walk.walker import BlockWalker
from saap.settings.registry import Importance

CASES = [
    ("mixtral", Importance.REAP, Role.EXPERT), ("mixtral", Importance.FREQUENCY, Role.EXPERT),
    ("mixtral", Importance.RECONSTRUCTION, Role.EXPERT), ("mixtral", Importance.TOKEN_FISHER, Role.EXPERT),
    ("llama", Importance.TOKEN_FISHER, Role.FFN), ("llama", Importance.FUSED, Role.ATTENTION),
]  # fmt: skip


class _InterruptError(Exception):
    pass


def scores(
    model: Any, graph: ModelGraph, importance: Importance, role: Role, spill: Spill, seen: list[tuple[int, int]]
) -> ImportanceScores:
    text = CalibrationSet(sources=("random",), seed=0, tokens=families.token_ids(5, 9).numpy())
    backend = Backend(model, graph, spill=spill, progress=lambda *step: seen.append(step))
    return estimate(backend, text, roles=[role], importance=importance, micro_batch=2)


def stopped_at(monkeypatch: pytest.MonkeyPatch, passes: int) -> list[int]:
    """Passes through a block: those of every one are counted, and the first beyond `passes` stops the walk."""
    visited: list[int] = []
    stock = BlockWalker.run_block

    def run_block(self: BlockWalker, index: int, *arguments: Any) -> Any:
        if not visited or visited[-1] != index or torch.is_grad_enabled() is not state[0]:
            if len(visited) == passes:
                raise _InterruptError
            visited.append(index)
            state[0] = torch.is_grad_enabled()
        return stock(self, index, *arguments)

    state = [False]
    monkeypatch.setattr(BlockWalker, "run_block", run_block)
    return visited


@pytest.mark.parametrize(("family", "importance", "role"), CASES)
def test_the_second_run_visits_only_what_is_left(
    family: str, importance: Importance, role: Role, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = families.build(family)
    graph = discover(model)
    blocks = len(graph.blocks)
    steps = blocks if importance.of_experts else 2 * blocks
    expected = scores(model, graph, importance, role, Spill(tmp_path / "whole"), [])
    for passes in range(1, steps):
        spill = Spill(tmp_path / str(passes), lambda: None)
        with monkeypatch.context() as patch:
            visited = stopped_at(patch, passes)
            with pytest.raises(_InterruptError):
                scores(model, graph, importance, role, spill, [])
        seen: list[tuple[int, int]] = []
        with monkeypatch.context() as patch:
            again = stopped_at(patch, steps)
            found = scores(model, graph, importance, role, spill, seen)
        order = [*range(blocks), *reversed(range(blocks))][:steps]
        assert visited + again == order
        assert seen == [(one + 1, steps - passes) for one in range(steps - passes)]
        assert found.digest == expected.digest


def test_the_folder_has_only_what_later_blocks_need(tmp_path: Path) -> None:
    model = families.build("mixtral")
    graph = discover(model)
    spill = Spill(tmp_path, lambda: None)
    first = scores(model, graph, Importance.REAP, Role.EXPERT, spill, [])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".safetensors", ".spill"]
    seen: list[tuple[int, int]] = []
    again = scores(model, graph, Importance.REAP, Role.EXPERT, spill, seen)
    assert (again.digest, seen) == (first.digest, [])
    other = scores(model, graph, Importance.FREQUENCY, Role.EXPERT, spill, seen)  # of another walk nothing is taken
    assert other.digest != first.digest
    assert len(seen) == len(graph.blocks)


@pytest.mark.parametrize("what", ["record", "stream"])
def test_damaged_records_are_refused(what: str, tmp_path: Path) -> None:
    model = families.build("mixtral")
    graph = discover(model)
    spill = Spill(tmp_path, lambda: None)
    scores(model, graph, Importance.REAP, Role.EXPERT, spill, [])
    (stream,) = tmp_path.glob("*.spill")
    path = tmp_path / NAME if what == "record" else stream
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StaleInputError, match="has no finished blocks"):
        scores(model, graph, Importance.REAP, Role.EXPERT, spill, [])


def test_a_run_on_another_device_starts_over_and_does_not_say_that_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record has tensors of its own device."""
    model, told = families.build("mixtral"), list[str]()
    graph = discover(model)
    spill = Spill(tmp_path, lambda: told.append("resumed"))
    for name, expected in (("cpu", 0), ("cpu", 1), ("cpu:0", 1)):
        monkeypatch.setattr(Backend, "device", torch.device(name))
        seen: list[tuple[int, int]] = []
        scores(model, graph, Importance.REAP, Role.EXPERT, spill, seen)
        assert len(told) == expected
    assert len(seen) == len(graph.blocks)


def test_without_a_record_nothing_is_resumed(tmp_path: Path) -> None:
    assert read_finished(tmp_path, "walk") is None
