from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

from saap.core.errors import ConfigurationError
from saap.models.checkpoint.groupwise import GroupwiseLinear
from saap.models.walk.processes import Processes
from saap.recovery.adapter import AdaptedLinear
from saap.recovery.quantise import quantise
from saap.recovery.sharding import check_shardable, shard_layers, unshard

COUNT = 2
FROZEN = ("packed", "scale", "zero", "bias")


def adapted() -> AdaptedLinear:
    generator = torch.Generator().manual_seed(0)
    weight = quantise(torch.randn(33, 64, generator=generator), group_size=16, bits=4)
    bias = nn.Parameter(torch.randn(33, generator=generator), requires_grad=False)
    layer = AdaptedLinear(GroupwiseLinear(weight, bias), rank=4, alpha=4.0, generator=generator, scales=True)
    with torch.no_grad():
        layer.second.normal_(generator=generator)
    return layer


def outcome(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Output and gradients of a forward and a backward, the way the training does it: first without a graph."""
    inputs = torch.linspace(-1, 1, 3 * 64).reshape(3, 64).requires_grad_(True)
    with torch.no_grad():
        first = layer(inputs)
    output = layer(inputs)
    output.square().sum().backward()
    learned = {name: value.grad for name, value in layer.named_parameters() if value.requires_grad}
    return {"first": first, "output": output.detach(), "inputs": inputs.grad, **learned}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=COUNT)
    layer = adapted()
    torch.manual_seed(0)
    plain = nn.Linear(64, 5).requires_grad_(False)
    before = copy.deepcopy(plain)
    shard_layers([layer, plain], torch.device("cpu"), Processes(rank, COUNT))
    held: dict[str, int] = {n: p.to_local().nbytes for n, p in layer.named_parameters() if n in FROZEN}
    found: dict[str, Any] = {**outcome(layer), "held": held}
    with torch.no_grad():
        found["plain"] = float((plain(torch.ones(64)) - before(torch.ones(64))).abs().max())
    unshard(layer)
    merged = layer.merged()
    found |= {"codes": merged.quantised.codes(), "zero": merged.zero, "scale": merged.scale, "bias": merged.bias}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_a_split_layer_computes_what_the_whole_one_does(tmp_path: Path) -> None:
    spawn(work, (str(tmp_path),), nprocs=COUNT)
    layer = adapted()
    expected, merged = outcome(layer), layer.merged()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(COUNT)]
    for part in parts:
        for name, value in expected.items():
            assert torch.equal(part[name], value), name
        assert part["plain"] == 0
        assert torch.equal(part["codes"], merged.quantised.codes())
        assert torch.equal(part["zero"], merged.zero)
        assert torch.equal(part["scale"], merged.scale)
        assert torch.equal(part["bias"], layer.bias)
    whole = {name: getattr(layer, name).nbytes for name in FROZEN}
    assert {name: sum(part["held"][name] for part in parts) for name in FROZEN} == whole
    assert max(part["held"]["packed"] for part in parts) <= whole["packed"] * 17 / 33


def test_layers_that_some_tokens_pass_by_are_refused() -> None:
    block = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "router": nn.Linear(2, 2)})
    model = nn.ModuleDict({"layers": nn.ModuleList([block])})
    check_shardable(model, ["layers.0.router"])
    with pytest.raises(ConfigurationError, match=r"layers\.0\.experts has layers that tokens may bypass"):
        check_shardable(model, ["layers.0.router", "layers.0.experts.1"])
