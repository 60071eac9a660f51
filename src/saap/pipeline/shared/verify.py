"""Check of a written model: its logits on a few tokens against those of the model in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saap.core.errors import VerificationError, failure_of
from saap.evaluation.perplexity import model_logits
from saap.models.walk.probe import read_at_once

CHECKED_TOKENS = 64


@torch.no_grad()
def few_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits in float32 on the first tokens of `ids` (1, tokens)."""
    return model_logits(model, ids[:, : read_at_once(model, CHECKED_TOKENS)]).float()


def check_written(name: str, model: nn.Module, ids: Tensor, expected: Tensor | None, limit: Tensor | float) -> None:
    """Raise VerificationError unless the written model gives finite logits, which are those of the one in memory.

    name: of the result. ids: on the device of the model. expected: `few_logits` of the model in memory, None if it is
    gone. limit: largest difference of a logit.
    """
    what, fault = f"The written model ({name})", "report this model and command as a fault of saap"
    try:
        found = few_logits(model, ids)
    except Exception as error:  # the code of its class
        remedy = f"In Python, leave out `out` to keep it in memory, and {fault}"
        raise VerificationError(f"{what} does not run ({failure_of(error)})", remedy) from error
    if not bool(found.isfinite().all()):
        raise VerificationError(f"{what} gives logits that are not finite", "Use --dtype float32")
    if expected is None:
        return
    difference = (expected.to(found.device) - found).abs()
    if not bool((difference <= limit).all()):
        offender = f"{what} does not compute what the one in memory does"
        remedy = f"Use --dtype float32, or {fault}"
        raise VerificationError(f"{offender} (logits differ by {float(difference.max()):.1e})", remedy)
