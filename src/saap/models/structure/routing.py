"""Experts that a router never selects, without cutting them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from saap.core.records import AxisSlice, CoupledGroup


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
            tensor = _tensor(model, member)
            if tensor.numel() == tensor.shape[member.axis]:
                biases.setdefault(tensor, (member.axis, []))[1].extend(member.indices(removed))
            elif tensor.ndim == 2:
                routers.setdefault(tensor, []).extend(member.indices(removed))
    return _NeverChosen(WeakTensorKeyDictionary(routers), WeakTensorKeyDictionary(biases))


def _tensor(model: nn.Module, member: AxisSlice) -> Tensor:
    path, _, name = member.tensor.rpartition(".")
    module = model.get_submodule(path)
    found: Tensor = module._parameters[name] if name in module._parameters else module._buffers[name]  # type: ignore[assignment]
    return found


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
