"""Frozen weights sharded over the processes of a run (FSDP2), gathered layer by layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from saap.core.errors import ConfigurationError
from saap.models.walk.processes import Processes


def check_shardable(model: nn.Module, layers: Iterable[str]) -> None:
    """Raise ConfigurationError if tokens may bypass a layer: processes would wait for each other.

    layers: module paths. Layers in a module list inside a block are assumed to be experts.
    """
    for path in layers:
        names = path.split(".")
        parents = [".".join(names[:end]) for end in range(1, len(names))]
        lists = [parent for parent in parents if isinstance(model.get_submodule(parent), nn.ModuleList)]
        if len(lists) > 1:  # the first list is that of the blocks
            raise ConfigurationError(
                f"{lists[1]} has layers that tokens may bypass, which cannot be sharded over processes",
                "Leave out --shard",
            )


def shard_layers(layers: Iterable[nn.Module], device: torch.device, processes: Processes) -> None:
    """Shard the frozen weights of each layer, parameters and buffers, over the processes, in place.

    Trained parameters are not sharded. A layer gathers its weights for its forward and again for its backward, so all
    processes must call the same layers in the same order.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.count,))
    for layer in layers:
        for name, buffer in list(layer.named_buffers(recurse=False)):
            delattr(layer, name)
            layer.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
        learned = {parameter for parameter in layer.parameters() if parameter.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=learned)


def unshard(layer: nn.Module) -> None:
    """Gather the weights of a layer permanently, if they were sharded. All processes must call this."""
    whole = getattr(layer, "unshard", None)  # FSDP2 adds it to sharded layers
    if callable(whole):
        whole()
