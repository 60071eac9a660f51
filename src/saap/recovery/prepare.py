"""What is trained: adapters on quantised layers, or plain LoRA on layers as they are."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saap.core.errors import ConfigurationError
from saap.models.checkpoint.groupwise import GroupwiseLinear, GroupwiseWeight, linears_inside, pack_linear
from saap.models.structure.linear import weight_out_in
from saap.models.walk.sharding import unshard
from saap.models.walk.walker import BlockWalker
from saap.recovery.adapter import AdaptedLinear
from saap.recovery.quantise import quantise_with_feedback


def adapt(model: nn.Module, *, rank: int, alpha: float, seed: int, scales: bool = False) -> dict[str, nn.Parameter]:
    """Give every quantised layer an adapter, in place. Returns the adapters' parameters by name.

    scales: whether the layers' scales are learned too.
    """
    generator = torch.Generator().manual_seed(seed)
    for path, module in list(model.named_modules()):
        if isinstance(module, GroupwiseLinear):
            adapted = AdaptedLinear(module, rank=rank, alpha=alpha, generator=generator, scales=scales)
            model.set_submodule(path, adapted)
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if isinstance(module, AdaptedLinear)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    }


def merge(model: nn.Module) -> dict[str, GroupwiseWeight]:
    """Merge every adapter into its layer's scales and zero points, in place. Returns the packed weights by path."""
    for path, module in list(model.named_modules()):
        if isinstance(module, AdaptedLinear):
            unshard(module)
            model.set_submodule(path, module.merged())
    return {path: module.quantised for path, module in model.named_modules() if isinstance(module, GroupwiseLinear)}


def require_peft() -> None:
    """Raise ConfigurationError now if plain LoRA could not be made later."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigurationError("Plain LoRA needs the package peft", "Run pip install 'saap[recover]'")


def add_lora(
    model: Any, paths: Collection[str], *, rank: int, alpha: float, seed: int
) -> tuple[Any, dict[str, nn.Parameter]]:
    """Plain LoRA on the linear layers at these paths, in place, with peft.

    Returns its handle, whose `merge_and_unload` gives the plain model, and the trained parameters by name.
    """
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        handle = get_peft_model(
            model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(paths))
        )
    return handle, {name: value for name, value in model.named_parameters() if value.requires_grad}


@torch.no_grad()
def quantise_by_feedback(
    model: nn.Module,
    blocks: Sequence[str],
    samples: Sequence[Tensor],
    *,
    group_size: int,
    bits: int,
    progress: Callable[[int, int], None],
) -> None:
    """Quantise a loaded model with error feedback, in place and block by block.

    samples: token ids, (1, length) each. A block sees what the quantised blocks before it put out.
    """
    walker = BlockWalker(model, blocks)
    streams = [walker.start(sample) for sample in samples]
    hidden = [stream.hidden for stream in streams]
    for layer in range(len(blocks)):
        grams = _grams(walker, layer, hidden, [stream.contexts for stream in streams])
        for name, gram in grams.items():
            stored = weight_out_in(model.get_submodule(name))
            weight = quantise_with_feedback(stored, gram, group_size=group_size, bits=bits)
            pack_linear(model, name, weight, gram.device)
        hidden = [walker.run_block(layer, one, stream.contexts) for one, stream in zip(hidden, streams, strict=True)]
        progress(layer + 1, len(blocks))


def _grams(walker: BlockWalker, layer: int, hidden: Sequence[Tensor], contexts: Sequence[Any]) -> dict[str, Tensor]:
    """Gram matrix of the inputs of each linear layer of a block, by path; zero for one that no token reaches."""
    sizes = linears_inside(walker.model, [walker.paths[layer]])
    device = hidden[0].device
    grams = {path: torch.zeros(size, size, device=device) for path, size in sizes.items()}

    def hook_for(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            flat = arguments[0].reshape(-1, arguments[0].shape[-1]).float()
            grams[path].addmm_(flat.T, flat)

        return hook

    handles = [walker.model.get_submodule(path).register_forward_pre_hook(hook_for(path)) for path in sizes]
    try:
        for one, context in zip(hidden, contexts, strict=True):
            walker.run_block(layer, one, context)
    finally:
        for handle in handles:
            handle.remove()
    return grams
