from __future__ import annotations

import pytest
import torch

from saap.core.errors import ConfigurationError
from saap.models.walk.processes import Processes


@pytest.mark.parametrize("items", [0, 1, 3, 4, 10, 11])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_shares_are_equal_parts_in_order(items: int, count: int) -> None:
    shares = [Processes(rank, count).share(items) for rank in range(count)]
    assert [item for share in shares for item in share] == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert len(shares[0]) == max(map(len, shares))


def test_a_process_alone_has_nobody_to_wait_for() -> None:
    alone = Processes.found()
    assert (alone, alone.first, alone.device(torch.device("cpu"))) == (Processes(), True, torch.device("cpu"))
    values = torch.arange(3.0)
    assert torch.equal(alone.total(values), values)
    assert torch.equal(alone.broadcast(values), values)
    assert (alone.broadcast_result(lambda: 7), alone.gather("part")) == (7, ["part"])
    alone.barrier()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is not a number"),
        (
            {"WORLD_SIZE": "2", "RANK": "0"},
            "WORLD_SIZE is 2, but the processes cannot connect to each other .*MASTER_ADDR",
        ),
    ],
)
def test_an_odd_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=message):
        Processes.found()
