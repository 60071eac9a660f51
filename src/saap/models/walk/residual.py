"""How the outputs of a block's modules enter the residual stream: found by trying, whatever the block's class."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saap.models.loading.precision import at_least_float32, in_float64
from saap.models.walk.capture import Capture, capture
from saap.models.walk.walker import BlockWalker, Contexts

_SMALLEST_SCALE = 0.1
"""A norm's scale of a channel is taken as at least this share of their RMS: less hardly reaches the stream."""


@dataclass(frozen=True, slots=True)
class ResidualPath:
    """How one module's output y enters the block's output: as gain * y, or gain * norm(y); without gain neither.

    module, norm: paths.
    """

    module: str
    gain: float | None
    norm: str | None = None


@dataclass(frozen=True, slots=True)
class ResidualEntry:
    """How a module's output y adds to the residual stream: gain * y, or gain * norm(y).

    norm: a module with norm(y) = c * scale * y, where c is a number for each token, of float32 at least; scale:
    (width,).
    """

    gain: float
    norm: nn.Module | None = None
    scale: Tensor | None = None

    @classmethod
    def along(cls, path: ResidualPath, model: nn.Module, like: Tensor) -> ResidualEntry | None:
        """The entry along a path; None where it is unknown. like: (..., width), of the outputs' type and device."""
        if path.gain is None:
            return None
        if path.norm is None:
            return cls(path.gain)
        norm = copy.deepcopy(model.get_submodule(path.norm)).to(torch.promote_types(like.dtype, torch.float32))
        return cls(path.gain, norm, _scale(norm, at_least_float32(like)))

    def added(self, output: Tensor) -> Tensor:
        """What an output adds to the stream; both (..., width)."""
        passed: Tensor = output if self.norm is None else self.norm(at_least_float32(output))
        return self.gain * passed

    def token_weights(self, output: Tensor) -> Tensor:
        """How sensitive the stream is to an error of each token's output, (..., 1), float32; 0 for an output of zero.

        All 1 where no norm is in between.
        """
        if self.norm is None or self.scale is None:
            return torch.ones_like(output[..., :1], dtype=torch.float32)
        passed: Tensor = self.norm(at_least_float32(output)).float()
        scaled = self.scale * output.float()
        weights: Tensor = passed.norm(dim=-1, keepdim=True) / scaled.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return weights

    def target(self, dense: Tensor, gap: Tensor) -> Tensor:
        """What the module should put out where the dense one gives `dense` and the stream lacks `gap`; (..., width).

        Behind a norm: of the length of the dense output, up to what the gap adds.
        """
        if self.scale is None:
            return dense + gap / self.gain
        weights = self.token_weights(dense)
        least = _SMALLEST_SCALE * self.scale.square().mean().sqrt()
        scale = torch.where(self.scale < 0, -1.0, 1.0) * self.scale.abs().clamp_min(least)
        change = torch.where(weights > 0, gap / (self.gain * weights * scale), 0.0)
        return dense + change


def _scale(norm: nn.Module, like: Tensor) -> Tensor:
    """What a norm multiplies channels of equal size by, (width,)."""
    ones = torch.ones_like(like.reshape(-1, like.shape[-1])[:1])
    scale: Tensor = norm(ones)[0].float()
    return scale


@torch.no_grad()
def residual_paths(
    walker: BlockWalker, layer: int, paths: Sequence[str], hidden: Tensor, contexts: Contexts
) -> list[ResidualPath]:
    """How the output of each module at `paths` enters the block's output, in the order in which they run.

    The gain is g where an extra output e changes the block's output by g * e while the outputs of the modules that
    run later are held (1 for a plain residual connection). Where it is no multiple of e, the same is tried for the
    module that the output goes into, if that is a norm without centring. hidden: (sequences, tokens, width), with the
    contexts of a batch of that shape.
    """
    with capture(walker.model, paths) as seen, _readers(walker, layer, seen) as readers:
        before = walker.run_block(layer, hidden, contexts)
    order = list(seen)
    found: list[ResidualPath] = []
    for position, path in enumerate(order):
        later = {other: seen[other].output for other in order[position + 1 :]}

        def gain(entering: str, output: Tensor, held: Mapping[str, Tensor] = later) -> float | None:
            extra = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
            # Also above the rounding of the stream in bfloat16, which may be far larger than this output.
            extra *= torch.maximum(output.std(), 4 * before.std()).clamp_min(1e-6)
            with _fixed_outputs(walker.model, {entering: output + extra, **held}):
                change = walker.run_block(layer, hidden, contexts) - before
            return _multiple(change, extra)

        output, norm = seen[path].output, readers.get(path)
        plain = gain(path, output)
        if plain is None and norm is not None and _only_scales(walker.model.get_submodule(norm), output):
            found.append(ResidualPath(path, gain(norm, walker.model.get_submodule(norm)(output)), norm))
        else:
            found.append(ResidualPath(path, plain))
    return found


@contextmanager
def _readers(walker: BlockWalker, layer: int, seen: Mapping[str, Capture]) -> Iterator[dict[str, str]]:
    """Find, while a block runs, the module without parts that each captured output goes into, by path."""
    readers: dict[str, str] = {}

    def hook_for(reader: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            for path, taken in seen.items():
                if arguments and arguments[0] is taken.output:
                    readers.setdefault(path, reader)

        return hook

    handles = [
        module.register_forward_pre_hook(hook_for(f"{walker.paths[layer]}.{name}"))
        for name, module in walker.blocks[layer].named_modules()
        if name and not module._modules
    ]
    try:
        yield readers
    finally:
        for handle in handles:
            handle.remove()


def _only_scales(norm: nn.Module, output: Tensor) -> bool:
    """Whether a module multiplies every token by a number and every channel by another."""
    try:
        scale, passed = _scale(norm, output), norm(output)
    except (RuntimeError, TypeError):  # no module of one tensor of this width
        return False
    if not isinstance(passed, Tensor) or passed.shape != output.shape:
        return False
    scaled, passed = in_float64(scale * output), in_float64(passed)
    factor = (passed * scaled).sum(-1, keepdim=True) / scaled.square().sum(-1, keepdim=True).clamp_min(1e-30)
    return bool(((passed - factor * scaled).norm() < 1e-2 * passed.norm()).item()) and bool((factor > 0).all().item())


def _multiple(change: Tensor, extra: Tensor) -> float | None:
    if change.shape != extra.shape:
        return None
    change, extra = in_float64(change), in_float64(extra)
    factor = float((change * extra).sum() / extra.square().sum())
    rest = float((change - factor * extra).norm() / extra.norm())
    return factor if abs(factor) > 1e-3 and rest < 1e-2 * abs(factor) else None


@contextmanager
def _fixed_outputs(model: nn.Module, outputs: dict[str, Tensor]) -> Iterator[None]:
    def hook_for(value: Tensor) -> Any:
        return lambda module, arguments, output: value

    handles = [model.get_submodule(path).register_forward_hook(hook_for(value)) for path, value in outputs.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
