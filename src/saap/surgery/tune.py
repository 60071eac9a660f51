"""A few gradient steps on one block towards what the dense block puts out.

Least squares moves only the matrices that read removed channels. These steps also move the ones that make the
channels that stay. Nothing flows from one block to another, so the memory is that of one block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saap.models.walker import BlockWalker, Contexts


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSettings:
    """Adam steps of one sequence each.

    passes: over the fitting sequences. rate: of a matrix, relative to the root mean square of its entries; of a vector
    (norms, biases) 0.3 of that. warm_up: share of the steps.
    """

    passes: float = 1.0
    rate: float = 2e-3
    warm_up: float = 0.1
    seed: int = 0


def tune_block(
    walker: BlockWalker,
    layer: int,
    contexts: Contexts,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    held: int,
    settings: TuneSettings,
) -> float:
    """Move the block's weights in place so that it maps `inputs` to `targets` better.

    inputs, targets: one (1, tokens, width) tensor per sequence, with `contexts` of that shape. The last `held`
    sequences only judge: if their error does not fall, the weights stay as they were. Errors are squared differences,
    each token's divided by the root mean square of its target. Returns the held-out error relative to that before.
    """
    block = walker.blocks[layer]
    fitting = len(inputs) - held
    steps = math.ceil(settings.passes * fitting)
    if steps < 1 or held < 1:
        return 1.0
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    start = _held_error(walker, layer, contexts, inputs[fitting:], targets[fitting:])
    with _learning(block) as parameters:
        _descend(walker, layer, contexts, inputs[:fitting], targets[:fitting], parameters, steps, settings)
    after = _held_error(walker, layer, contexts, inputs[fitting:], targets[fitting:])
    if not after < start:
        for name, parameter in block.named_parameters():
            parameter.data.copy_(before[name])
        return 1.0
    return after / start


def _descend(
    walker: BlockWalker,
    layer: int,
    contexts: Contexts,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    steps: int,
    settings: TuneSettings,
) -> None:
    rates = [_rate(parameter, settings) for parameter in parameters]
    groups = [{"params": [parameter], "lr": rate} for parameter, rate in zip(parameters, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(settings.seed + layer)
    order: list[int] = []
    for step in range(steps):
        if not order:
            order = torch.randperm(len(inputs), generator=generator).tolist()
        index = order.pop()
        warm = min(1.0, (step + 1) / max(1.0, settings.warm_up * steps))
        factor = warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        with torch.enable_grad():
            loss = _error(walker.run_block(layer, inputs[index], contexts), targets[index])
            gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None


def _rate(parameter: nn.Parameter, settings: TuneSettings) -> float:
    size = float(parameter.detach().double().square().mean().sqrt())
    return settings.rate * size * (1.0 if parameter.ndim > 1 else 0.3)


def _error(output: Tensor, target: Tensor) -> Tensor:
    scale = target.float().square().mean(-1).sqrt().clamp_min(1e-6)
    squares: Tensor = (output.float() - target.float()).square().mean(-1) / scale
    return squares.mean()


def _held_error(
    walker: BlockWalker, layer: int, contexts: Contexts, inputs: Sequence[Tensor], targets: Sequence[Tensor]
) -> float:
    return sum(
        float(_error(walker.run_block(layer, one, contexts), target))
        for one, target in zip(inputs, targets, strict=True)
    )


@contextmanager
def _learning(block: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The block's floating-point parameters, which want gradients for a while."""
    parameters = [parameter for parameter in block.parameters() if parameter.is_floating_point() and parameter.numel()]
    asked = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield parameters
    finally:
        for parameter, before in zip(parameters, asked, strict=True):
            parameter.requires_grad_(before)
