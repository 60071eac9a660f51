"""Image inputs of multimodal models, matched to rows of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saap.core.records import CalibrationSet

Inputs = Mapping[str, Tensor]
# Configuration fields with the id of image tokens.
_IMAGE_TOKEN_NAMES = ("image_token_id", "image_token_index")


def image_token_ids(config: Any) -> tuple[int, ...]:
    """Ids of image tokens of a model; () for a text-only model."""
    found = {getattr(config, name, None) for name in _IMAGE_TOKEN_NAMES}
    return tuple(sorted(value for value in found if isinstance(value, int)))


@contextmanager
def with_images(model: nn.Module, sets: Iterable[CalibrationSet]) -> Iterator[None]:
    """Context in which a forward of `model` on rows of `sets` also gets the image inputs of these rows.

    Rows are identified by their ids; a batch with an unknown row is not changed.
    """
    table: dict[bytes, Inputs] = {}
    for one in sets:
        for row, inputs in zip(one.tokens, one.inputs, strict=False):
            table[_key(torch.from_numpy(row))] = {name: torch.from_numpy(value) for name, value in inputs.items()}
    if not table:
        yield
        return

    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any] | None:
        ids = arguments[0] if arguments else keywords.get("input_ids")
        rows = [table.get(_key(row)) for row in ids] if isinstance(ids, Tensor) else []
        found = [row for row in rows if row is not None]
        if not found or len(found) < len(rows):
            return None
        return arguments, {**keywords, **_batch(found, next(module.parameters()))}

    with model.register_forward_pre_hook(hook, with_kwargs=True):
        yield


def _key(row: Tensor) -> bytes:
    return row.detach().cpu().numpy().tobytes()


def _batch(rows: list[Inputs], like: Tensor) -> dict[str, Tensor]:
    """The rows' inputs concatenated along the first axis, on the device and in the type of the weights.

    If shapes differ, all other axes are padded with zeros at the end, as processors do for fewer images.
    """
    batch: dict[str, Tensor] = {}
    for name in rows[0]:
        tensors = [row[name] for row in rows]
        sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
        joined = tensors[0].new_zeros(sum(map(len, tensors)), *sizes)
        for tensor, room in zip(tensors, torch.split(joined, [*map(len, tensors)]), strict=True):
            room[(slice(None), *(slice(size) for size in tensor.shape[1:]))] = tensor
        batch[name] = joined.to(like.device, like.dtype if joined.is_floating_point() else joined.dtype)
    return batch
