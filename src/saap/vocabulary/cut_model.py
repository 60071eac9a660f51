"""The cut of a model's rows: embedding, head and its bias, and the ids in its configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saap.core.errors import ModelError, UnsupportedModelError, VerificationError
from saap.models.checkpoint.layer_fields import text_part
from saap.vocabulary.cut_tokenizer import renumbered

# Fields of a configuration or generation_config that hold ids of tokens, in whatever nesting.
ID_ENDINGS = ("token_id", "token_ids", "token_index")
ID_FIELDS = (
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "forced_decoder_ids",
    "sequence_bias",
)  # fmt: skip
CHECKED_TOKENS, TOLERANCE = 16, 1e-3


def embedding_of(model: nn.Module) -> nn.Embedding:
    """The input embedding of a transformers model. Raises ModelError for a model without one."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Embedding) or not hasattr(model, "resize_token_embeddings"):
        raise ModelError(
            f"{type(model).__name__} has no embedding that transformers can resize",
            "Use a transformers model, or leave the vocabulary out",
        )
    return embedding


def ids_in_settings(model: nn.Module, rows: int) -> set[int]:
    """Ids of tokens that the model's configuration and generation settings name."""
    found: list[int] = []

    def note(token: int) -> int:
        found.append(token)
        return token

    for holder in _holders(model):
        for name in _id_fields(holder):
            _mapped(name, getattr(holder, name), note)
    return {token for token in found if 0 <= token < rows}


@torch.no_grad()
def cut_rows(model: nn.Module, kept: Sequence[int], logits: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Keep only the rows of the ids `kept`, ascending, in place; ids in the settings follow.

    logits: of a model for token ids (1, tokens). Raises UnsupportedModelError for a model with other tables of tokens,
    and VerificationError if the model then computes other logits of the kept tokens.
    """
    embedding: Any = embedding_of(model)
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    rows, device = embedding.num_embeddings, embedding.weight.device
    index = torch.tensor(kept)
    plain = index[~torch.isin(index, torch.tensor(sorted(ids_in_settings(model, rows)), dtype=index.dtype))]
    few = plain[torch.linspace(0, len(plain) - 1, min(CHECKED_TOKENS, len(plain))).long()]
    expected = logits(model, few[None].to(device))[..., index.to(device)].float()
    tensors = {id(tensor): tensor for tensor in _tables(embedding, head, rows)}
    for tensor in tensors.values():
        tensor[: len(kept)] = tensor[index.to(tensor.device)]
    changed: Any = model
    changed.resize_token_embeddings(len(kept), mean_resizing=False)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        head.out_features = head.weight.shape[0]
    _renumber_settings(model, rows, renumbered(kept))
    padding = getattr(text_part(changed.config), "pad_token_id", None)
    embedding_of(model).padding_idx = padding if padding is not None and 0 <= padding < len(kept) else None
    changed.eval().requires_grad_(False)
    new = torch.arange(len(kept))[torch.isin(index, few)]
    try:
        found = logits(model, new[None].to(device)).float()
    except Exception as error:  # the model's own code may raise anything
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run with fewer tokens", "Leave the vocabulary out"
        ) from error
    scale = expected.abs().max().clamp_min(1e-6)
    if found.shape != expected.shape or not bool((found - expected).abs().max() <= TOLERANCE * scale):
        raise VerificationError(
            f"{type(model).__name__} computes other logits with fewer tokens", "Leave the vocabulary out"
        )


def _tables(embedding: Any, head: Any, rows: int) -> Iterator[Tensor]:
    """The tensors with a row for each token. Raises UnsupportedModelError if the head has another number of rows."""
    yield embedding.weight
    for name in ("weight", "bias"):
        tensor = getattr(head, name, None)
        if tensor is None:
            continue
        if tensor.shape[0] != rows:
            raise UnsupportedModelError(
                f"The embedding has {rows:,} rows, but the head's {name} has {tensor.shape[0]:,}",
                "Leave the vocabulary out",
            )
        yield tensor


def _holders(model: nn.Module) -> Iterator[Any]:
    """The configuration, its parts, and the generation settings."""
    config: Any = getattr(model, "config", None)
    seen: dict[int, Any] = {}
    waiting = [config, getattr(model, "generation_config", None)]
    while waiting:
        holder = waiting.pop()
        if holder is None or id(holder) in seen:
            continue
        seen[id(holder)] = holder
        waiting += [value for value in vars(holder).values() if hasattr(value, "to_dict")]
    yield from seen.values()


def _id_fields(holder: Any) -> list[str]:
    return [
        name for name, value in vars(holder).items()
        if value is not None and not name.startswith("_") and (name.endswith(ID_ENDINGS) or name in ID_FIELDS)
    ]  # fmt: skip


def _mapped(name: str, value: Any, new: Callable[[int], int]) -> Any:
    """The value of a field with each id replaced.

    `forced_decoder_ids` are pairs of a place and an id, `sequence_bias` sequences of ids with a number.
    """
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return new(value)
    if isinstance(value, Mapping):
        return {tuple(new(token) for token in tokens): bias for tokens, bias in value.items()}
    if name == "forced_decoder_ids":
        return [[place, None if token is None else new(token)] for place, token in value]
    if name == "sequence_bias":
        return [[[new(token) for token in tokens], bias] for tokens, bias in value]
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(name, one, new) for one in value)
    return value


def _renumber_settings(model: nn.Module, rows: int, new: Mapping[int, int]) -> None:
    """Replace the ids in all settings; numbers that are no row of the old embedding stay."""
    for holder in _holders(model):
        for name in _id_fields(holder):
            value = _mapped(name, getattr(holder, name), lambda token: new[token] if 0 <= token < rows else token)
            setattr(holder, name, value)
