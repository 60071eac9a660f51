"""Whether a model runs: tried on a few tokens before anything that takes long."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saap.core.errors import UnsupportedModelError, first_line
from saap.models.walk.walker import inference_only, without_cache

FEW_TOKENS = 4
SHORTER = "Use shorter samples or windows"


def positions(model: nn.Module) -> int | None:
    """How many tokens the model reads at once by its configuration; None where that says nothing."""
    config: Any = getattr(model, "config", None)
    find = getattr(config, "get_text_config", lambda: config)
    stated = getattr(find(), "max_position_embeddings", None)
    return stated if isinstance(stated, int) and stated > 0 else None


def read_at_once(model: nn.Module, tokens: int) -> int:
    """`tokens`, or fewer where the model's configuration has no more positions."""
    return min(tokens, positions(model) or tokens)


@torch.no_grad()
def failure(model: nn.Module, ids: Tensor) -> str | None:
    """The error with which a forward on token ids (sequences, tokens) ends, in one line; None where it does not."""
    try:
        with inference_only(model):
            model(ids, **without_cache(model))
    except Exception as error:  # the model's own code fails in its own way
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def trial_ids(model: nn.Module, tokens: int) -> Tensor:
    """Token ids (1, tokens) that any vocabulary has, on the device of the model."""
    return 2 + torch.arange(tokens, device=next(model.parameters()).device)[None] % 5


def check_reads(model: nn.Module, tokens: int, remedy: str = SHORTER) -> None:
    """Raise UnsupportedModelError if the model fails to read so many tokens at once.

    Tried where its configuration does not promise it.
    """
    if tokens > (positions(model) or 0):
        check_runs(model, trial_ids(model, tokens), remedy)


def check_runs(model: nn.Module, ids: Tensor, remedy: str = SHORTER) -> None:
    """Run the model on token ids (sequences, tokens), as long as any that it is to read.

    Raises UnsupportedModelError if it fails, or if it exchanges its own modules, which a saved model would not know of.
    """
    name, before = type(model).__name__, dict(model.named_modules())
    reason = failure(model, ids[:, :FEW_TOKENS])
    if reason is not None:
        raise not_running(model, reason)
    reason = failure(model, ids)
    if reason is not None:
        raise UnsupportedModelError(f"{name} does not read {ids.shape[1]} tokens at once ({reason})", remedy)
    changed = [path for path, module in model.named_modules() if before.get(path) is not module]
    if changed:
        raise UnsupportedModelError(
            f"The forward of {name} replaces its module {changed[0]} by another one",
            "Set its configuration so that its modules stay what they are",
        )


def not_running(model: nn.Module, reason: str) -> UnsupportedModelError:
    """The refusal of a model that fails without being pruned. reason: as `failure` gives it."""
    return UnsupportedModelError(
        f"The dense model itself does not run: {type(model).__name__} ends with {reason}",
        "Use a model that transformers runs on token ids alone",
    )
