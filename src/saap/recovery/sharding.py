"""Frozen weights sharded over the processes of a run (FSDP2), gathered layer by layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from saap.core.errors import ConfigurationError
from saap.models.walk.processes import Processes


def check_shardable(model: nn.Module, layers: Iterable[str]) -> None:
    """Raise ConfigurationError if a layer may be left out for some tokens: the others would wait for its process.

    layers: module paths. Layers that stand in a list with their like inside a block are taken for experts.
    """
    for path in layers:
        names = path.split(".")
        parents = [".".join(names[:end]) for end in range(1, len(names))]
        lists = [parent for parent in parents if isinstance(model.get_submodule(parent), nn.ModuleList)]
        if len(lists) > 1:  # the first is that of the blocks
            raise ConfigurationError(
                f"{lists[1]} holds layers that some tokens pass by, which cannot be split over processes",
                "Leave out --shard",
            )


def shard_layers(layers: Iterable[nn.Module], device: torch.device, processes: Processes) -> None:
    """Shard the frozen weights of each layer, parameters and buffers, over the processes, in place.

    What is trained stays whole in every process. A layer gathers its weights for its forward and again for its
    backward, so all processes must call the same layers in the same order.
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
    """Give a layer its whole weights for good, if they were sharded. All processes must take part."""
    whole = getattr(layer, "unshard", None)  # FSDP2 gives it to the layers that it shards
    if callable(whole):
        whole()
