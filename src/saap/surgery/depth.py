"""Removal of whole decoder blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from saap.core.errors import UnsupportedModelError, first_line
from saap.models.checkpoint.stock_config import keep_layers, text_part

# Attributes that hold a block's own number.
BLOCK_NUMBER_NAMES = ("layer_idx", "layer_id", "layer_number")


def drop_blocks(model: nn.Module, blocks: Sequence[str], dropped: Sequence[int]) -> None:
    """Take blocks out of the model, number the others anew and shorten its configuration, in place.

    blocks: module paths of all blocks, members of one nn.ModuleList. Raises UnsupportedModelError where they are
    kept otherwise or where the configuration does not say how many there are.
    """
    parent = blocks[0].rpartition(".")[0]
    container = model.get_submodule(parent)
    if not isinstance(container, nn.ModuleList) or any(path.rpartition(".")[0] != parent for path in blocks):
        raise UnsupportedModelError("The decoder blocks are not members of one list", "Prune without the role block")
    kept = [layer for layer in range(len(blocks)) if layer not in set(dropped)]
    config = getattr(model, "config", None)
    if config is not None:
        decoder = text_part(config)
        if getattr(decoder, "num_hidden_layers", None) != len(blocks):
            raise UnsupportedModelError(
                f"The configuration does not say that there are {len(blocks)} blocks", "Prune without the role block"
            )
        try:
            keep_layers(decoder, kept, len(blocks))
        except Exception as error:  # classes that take no other number of layers
            raise UnsupportedModelError(
                f"The configuration does not take another number of layers ({first_line(error)})",
                "Prune without the role block",
            ) from error
    for layer in sorted(set(dropped), reverse=True):
        del container[layer]
    for new, old in enumerate(kept):
        for module in container[new].modules():
            for name in BLOCK_NUMBER_NAMES:
                if vars(module).get(name) == old:
                    setattr(module, name, new)
