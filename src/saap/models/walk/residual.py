"""Residual paths from module outputs to the residual stream, found by experiment for any block class."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saap.models.loading.precision import at_least_float32, in_float64
from saap.models.walk.observer import capture, hooked
from saap.models.walk.walker import BlockWalker, Contexts

_SMALLEST_SCALE = 0.1
"""Floor of a norm's scale, relative to the RMS over channels."""


@dataclass(frozen=True, slots=True)
class ResidualPath:
    """Path of a module's output y to the residual stream, which adds gain * y or gain * norm(y).

    norm_path: of the norm's module. norm: a copy of it in float32 at least, with norm(y) = c * scale * y, where c is
    one number per token; scale: (width,). Both are set by `loaded`.
    """

    gain: float
    norm_path: str | None = None
    norm: Callable[[Tensor], Tensor] | None = None
    scale: Tensor | None = None

    def loaded(self, model: nn.Module, like: Tensor) -> ResidualPath:
        """The path with its norm. like: (..., width), of the outputs' type and device."""
        if self.norm_path is None:
            return self
        norm = copy.deepcopy(model.get_submodule(self.norm_path)).to(torch.promote_types(like.dtype, torch.float32))
        return replace(self, norm=norm, scale=_scale(norm, at_least_float32(like)))

    def added(self, output: Tensor) -> Tensor:
        """The contribution of an output to the stream; both (..., width)."""
        return self.gain * (output if self.norm is None else self.norm(at_least_float32(output)))

    def token_weights(self, output: Tensor) -> Tensor:
        """Sensitivity of the stream to an error of each token's output, (..., 1), float32; 0 for an output of zero.

        All 1 without a norm on the path.
        """
        if self.norm is None or self.scale is None:
            return torch.ones_like(output[..., :1], dtype=torch.float32)
        passed, scaled = self.norm(at_least_float32(output)).float(), self.scale * output.float()
        weights: Tensor = passed.norm(dim=-1, keepdim=True) / scaled.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return weights

    def target(self, dense: Tensor, lacking: Tensor) -> Tensor:
        """Target output of the module, given the `dense` output and the residual error `lacking`; (..., width).

        On a path with a norm, the target has the length of the dense output, up to the residual error.
        """
        if self.scale is None:
            return dense + lacking / self.gain
        weights = self.token_weights(dense)
        least = _SMALLEST_SCALE * self.scale.square().mean().sqrt()
        scale = torch.where(self.scale < 0, -1.0, 1.0) * self.scale.abs().clamp_min(least)
        change = torch.where(weights > 0, lacking / (self.gain * weights * scale), 0.0)
        return dense + change


def _scale(norm: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Scale of a norm by channel, (width,)."""
    return norm(torch.ones_like(like.reshape(-1, like.shape[-1])[:1]))[0].float()


@torch.no_grad()
def residual_paths(
    walker: BlockWalker, layer: int, paths: Sequence[str], hidden: Tensor, contexts: Contexts
) -> dict[str, ResidualPath | None]:
    """Find the path of each module's output to the block's output, in execution order.

    None for an unknown path. The gain is g if an extra output e changes the block's output by g * e with the outputs of
    later modules fixed (1 for a plain residual connection). If the change is not a multiple of e, the same is tried for
    the module that consumes the output, if that is a norm without centring. hidden: (sequences, tokens, width), with
    the contexts of a batch of that shape.
    """
    model, consumers, found = walker.model, dict[str, str](), dict[str, ResidualPath | None]()

    def find_consumer(path: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        for producer, captured in seen.items():
            if arguments and arguments[0] is captured.output:
                consumers.setdefault(producer, path)

    without_parts = {
        module: partial(find_consumer, f"{walker.paths[layer]}.{name}")
        for name, module in walker.blocks[layer].named_modules()
        if name and not module._modules
    }
    with capture(model, paths) as seen, hooked(without_parts, before=True):
        before = walker.run_block(layer, hidden, contexts)

    def gain(path: str, output: Tensor, later: Mapping[str, Tensor]) -> float | None:
        extra = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        # large enough to exceed rounding of the stream in bfloat16, which may be far larger than this output
        extra *= torch.maximum(output.std(), 4 * before.std()).clamp_min(1e-6)
        fixed = {path: output + extra, **later}
        with hooked({model.get_submodule(one): lambda *_, value=value: value for one, value in fixed.items()}):
            change = walker.run_block(layer, hidden, contexts) - before
        return _multiple(change, extra)

    order = list(seen)
    for position, path in enumerate(order):
        later = {other: seen[other].output for other in order[position + 1 :]}
        output, norm, consumer = seen[path].output, None, consumers.get(path)
        size = gain(path, output, later)
        if size is None and consumer is not None and _only_scales(model.get_submodule(consumer), output):
            norm, size = consumer, gain(consumer, model.get_submodule(consumer)(output), later)
        found[path] = None if size is None else ResidualPath(size, norm)
    return found


def _only_scales(norm: nn.Module, output: Tensor) -> bool:
    """Whether a module multiplies each token by one number and each channel by another."""
    try:
        scale, passed = _scale(norm, output), norm(output)
    except (RuntimeError, TypeError):  # not a module of one tensor of this width
        return False
    if not isinstance(passed, Tensor) or passed.shape != output.shape:
        return False
    scaled, passed = in_float64(scale * output), in_float64(passed)
    factor = (passed * scaled).sum(-1, keepdim=True) / scaled.square().sum(-1, keepdim=True).clamp_min(1e-30)
    return bool(((passed - factor * scaled).norm() < 1e-2 * passed.norm()).item()) and bool((factor > 0).all().item())


def _multiple(change: Tensor, extra: Tensor) -> float | None:
    """The factor between `extra` and a change, if there is one."""
    if change.shape != extra.shape:
        return None
    change, extra = in_float64(change), in_float64(extra)
    factor = float((change * extra).sum() / extra.square().sum())
    rest = float((change - factor * extra).norm() / extra.norm())
    return factor if abs(factor) > 1e-3 and rest < 1e-2 * abs(factor) else None
