"""Names of tensors in published checkpoints, where the model's own differ: it may stack experts that files have apart.

transformers has the rules by family, in both directions, from version 5 on; before, models had the published names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saap.models.checkpoint.safetensor_files import StoredTensors, TensorEntry


def with_model_names(model: nn.Module, stored: StoredTensors) -> StoredTensors:
    """The stored tensors under the names of the model, stacked where it stacks them, still read one at a time."""
    held = model.state_dict(keep_vars=True)
    if held.keys() <= stored.shapes.keys():
        return stored
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    except ImportError:
        return stored
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = getattr(model, "base_model_prefix", None)
    renamed: dict[str, str] = {}
    parts: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(stored.shapes, key=dot_natural_key):
        target, pattern = (name, None) if name in held else rename_source_key(name, renamings, converters, prefix, held)
        if pattern is None:
            renamed[target] = name
        else:
            parts.setdefault(target, []).append((name, pattern))

    def converted(target: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        rule = deepcopy(by_pattern[parts[target][0][1]])
        for name, pattern in parts[target]:
            rule.add_tensor(target, name, pattern, read(name))
        found: Mapping[str, Any] = rule.convert(target, model=model, config=getattr(model, "config", None))
        return {name: one[0] if isinstance(one, list) else one for name, one in found.items()}

    def without_values(name: str) -> Tensor:
        return torch.empty(stored.shapes[name], dtype=stored.dtypes[name], device="meta")

    made = {target: converted(target, without_values) for target in parts}
    source = {name: target for target, found in made.items() for name in found}
    tensors = {name: tensor for found in made.values() for name, tensor in found.items()}
    shapes = {target: stored.shapes[name] for target, name in renamed.items()}
    dtypes = {target: stored.dtypes[name] for target, name in renamed.items()}

    def read(name: str) -> Tensor:
        return converted(source[name], stored.read)[name] if name in source else stored.read(renamed[name])

    return StoredTensors(
        shapes | {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        dtypes | {name: tensor.dtype for name, tensor in tensors.items()}, read,
    )  # fmt: skip


def with_published_names(model: nn.Module, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The tensors to write under the names of published checkpoints, so that all versions and other programs open them.

    Names stay if several of the model's tensors would have to become one.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return dict(entries)

    def reverted(name: str, tensor: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = revert_weight_conversion(model, {name: tensor})
        return found

    metas = {name: torch.empty(one.shape, dtype=one.dtype, device="meta") for name, one in entries.items()}
    whole = revert_weight_conversion(model, dict(metas))
    if whole.keys() == entries.keys():
        return dict(entries)
    published: dict[str, TensorEntry] = {}
    for name, entry in entries.items():
        found = {name: metas[name]} if name in whole else reverted(name, metas[name])
        if found.keys() == {name}:
            published[name] = entry
            continue
        values = _TakenApart(partial(reverted, name), entry)
        for part, tensor in found.items():
            published[part] = TensorEntry(dtype=entry.dtype, shape=tuple(tensor.shape), make=partial(values.take, part))
    return published if published.keys() == whole.keys() else dict(entries)


class _TakenApart:
    """Parts of one tensor, which is made once for all of them and released with the last."""

    def __init__(self, split: Callable[[Tensor], dict[str, Tensor]], entry: TensorEntry) -> None:
        self._split, self._entry, self._parts = split, entry, dict[str, Tensor]()

    def take(self, name: str) -> Tensor:
        """One of the parts."""
        if name not in self._parts:
            self._parts = self._split(self._entry.make())
        return self._parts.pop(name).contiguous()
