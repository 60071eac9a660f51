"""Early checks on a few tokens that a model runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saap.core.errors import UnsupportedModelError, failure_of
from saap.models.walk.walker import inference_only, last_logit_only, without_cache

FEW_TOKENS = 4
SHORTER = "Use shorter samples or windows"


def positions(model: nn.Module) -> int | None:
    """Maximum number of tokens by the model's configuration; None if it has no limit."""
    config: Any = getattr(model, "config", None)
    find = getattr(config, "get_text_config", lambda: config)
    stated = getattr(find(), "max_position_embeddings", None)
    return stated if isinstance(stated, int) and stated > 0 else None


def read_at_once(model: nn.Module, tokens: int) -> int:
    """`tokens`, limited by the positions of the model's configuration."""
    return min(tokens, positions(model) or tokens)


@torch.no_grad()
def failure(model: nn.Module, ids: Tensor) -> str | None:
    """Error of a forward pass on token ids (sequences, tokens) in one line; None if it succeeds."""
    try:
        with inference_only(model):
            model(ids, **without_cache(model), **last_logit_only(model))
    except Exception as error:  # the model's own code may raise any error
        return failure_of(error)
    return None


def trial_ids(model: nn.Module, tokens: int) -> Tensor:
    """Token ids (1, tokens) that exist in any vocabulary, on the device of the model."""
    return 2 + torch.arange(tokens, device=next(model.parameters()).device)[None] % 5


def check_reads(model: nn.Module, tokens: int, remedy: str = SHORTER) -> None:
    """Raise UnsupportedModelError if the model cannot process this many tokens at once.

    Tested only if its configuration does not guarantee it.
    """
    if tokens > (positions(model) or 0):
        check_runs(model, trial_ids(model, tokens), remedy)


def check_runs(model: nn.Module, ids: Tensor, remedy: str = SHORTER) -> None:
    """Run the model on token ids (sequences, tokens) of the maximum length to be used.

    Raises UnsupportedModelError if it fails, or replaces its own modules, which a saved model would not reflect.
    """
    name, before = type(model).__name__, dict(model.named_modules())
    reason = failure(model, ids[:, :FEW_TOKENS])
    if reason is not None:
        raise not_running(model, reason)
    reason = failure(model, ids)
    if reason is not None:
        raise UnsupportedModelError(f"{name} cannot process {ids.shape[1]} tokens at once ({reason})", remedy)
    changed = [path for path, module in model.named_modules() if before.get(path) is not module]
    if changed:
        raise UnsupportedModelError(
            f"The forward of {name} replaces its module {changed[0]} by another one",
            "Set its configuration so that its modules are not replaced",
        )


def not_running(model: nn.Module, reason: str) -> UnsupportedModelError:
    """Error for a dense model that does not run. reason: as returned by `failure`."""
    return UnsupportedModelError(
        f"The dense model itself does not run: {type(model).__name__} ends with {reason}",
        "Use a model that transformers runs on token ids alone",
    )
