"""The check of a written model."""

from __future__ import annotations

import pytest
import torch
from tests import families

from saap.core.errors import VerificationError
from saap.pipeline.shared.verify import check_written, few_logits


def test_another_model_is_refused_and_so_is_one_that_fails() -> None:
    model, ids = families.build("llama"), families.token_ids()[:1]
    expected = few_logits(model, ids)
    check_written("small", model, ids, expected, 0.0)
    check_written("small", model, ids, None, 0.0)
    with pytest.raises(VerificationError, match=r"\(small\) does not compute what the one in memory does"):
        check_written("small", model, ids, expected + 0.1, 0.05)
    check_written("small", model, ids, expected + 0.1, 0.2)
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(VerificationError, match="not finite"):
        check_written("small", model, ids, None, 1.0)
    model.forward = None
    with pytest.raises(VerificationError, match="does not run"):
        check_written("small", model, ids, None, 1.0)
