"""What a router selects: the experts of each token, and experts that it never selects, without cutting them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from saap.core.records import CoupledGroup

TOKENS_AT_ONCE = 2048
"""Tokens that experts process at once: their activations are those of several experts for each token."""


def experts_and_gates(arguments: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
    """Numbers and gates of each token's experts among the arguments of the experts' module; None unless both are.

    Both are (tokens, experts per token).
    """
    found = [one for one in arguments[1:] if isinstance(one, Tensor) and one.dim() == 2]
    numbers = next((one for one in found if not one.is_floating_point()), None)
    gates = (one for one in found if numbers is not None and one.is_floating_point() and one.shape == numbers.shape)
    gate = next(gates, None)
    return None if numbers is None or gate is None else (numbers, gate)


def pieces(arguments: Sequence[Any]) -> list[tuple[Any, ...]]:
    """The arguments of a call of experts for a part of the tokens at a time; one piece if they cannot be parted."""
    found = experts_and_gates(arguments)
    if found is None or any(isinstance(one, Tensor) and len(one) != len(found[0]) for one in arguments):
        return [tuple(arguments)]
    starts = range(0, max(1, len(found[0])), TOKENS_AT_ONCE)
    parts = (slice(start, start + TOKENS_AT_ONCE) for start in starts)
    return [tuple(one[part] if isinstance(one, Tensor) else one for one in arguments) for part in parts]


@contextmanager
def in_pieces(experts: Iterable[nn.Module]) -> Iterator[None]:
    """Context in which experts process a part of the tokens at a time, so that long samples take no more memory.

    They process tokens independently. Under autograd, all at once: each part would have a gradient of all weights.
    """
    modules = list(experts)
    own = [vars(module).get("forward") for module in modules]

    def forward(stock: Callable[..., Tensor], *arguments: Any, **keywords: Any) -> Tensor:
        parts = [arguments] if keywords or torch.is_grad_enabled() else pieces(arguments)
        outputs = [stock(*part, **keywords) for part in parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    for module in modules:
        vars(module)["forward"] = partial(forward, module.forward)
    try:
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            vars(module).pop("forward")
            if before is not None:
                vars(module)["forward"] = before


def never_chosen(
    model: nn.Module, groups: Iterable[CoupledGroup], keep: Mapping[str, Sequence[int]]
) -> TorchFunctionMode:
    """Context in which the experts of these groups that are not in `keep` are excluded from routing.

    Their router logits, and the biases that are added to the scores before the selection, are minus infinity.
    """
    routers: dict[Tensor, list[int]] = {}
    biases: dict[Tensor, tuple[int, list[int]]] = {}
    for group in groups:
        removed = group.others(keep.get(group.name, range(group.units)))
        for member in (*group.members, *group.buffers):
            tensor: Tensor = attrgetter(member.tensor)(model)
            if tensor.numel() == tensor.shape[member.axis]:
                biases.setdefault(tensor, (member.axis, []))[1].extend(member.indices(removed))
            elif tensor.ndim == 2:
                routers.setdefault(tensor, []).extend(member.indices(removed))
    return _NeverChosen(WeakTensorKeyDictionary(routers), WeakTensorKeyDictionary(biases))


class _NeverChosen(TorchFunctionMode):
    """routers: weight (experts, width), and what it is cast to -> removed experts. biases: vector -> axis and these."""

    def __init__(self, routers: WeakTensorKeyDictionary, biases: WeakTensorKeyDictionary) -> None:
        super().__init__()
        self.routers, self.biases = routers, biases

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Sequence[Any] = (), keywords: Any = None
    ) -> Any:
        given = [self._excluding(value) for value in arguments]
        named = {name: self._excluding(value) for name, value in (keywords or {}).items()}
        result = function(*given, **named)
        tensors = (value for value in (*given, *named.values()) if isinstance(value, Tensor))
        router = next((tensor for tensor in tensors if tensor in self.routers), None)
        if router is None or not isinstance(result, Tensor) or result is router:
            return result
        removed = self.routers[router]
        if function is nn.functional.linear:
            return result.index_fill(-1, torch.tensor(removed, device=result.device), -torch.inf)
        if result.shape == router.shape:  # of another type
            self.routers[result] = removed
        return result

    def _excluding(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value not in self.biases:
            return value
        axis, removed = self.biases[value]
        return value.index_fill(axis, torch.tensor(removed, device=value.device), -torch.inf)
