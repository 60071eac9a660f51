from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from saap.core.errors import CalibrationError
from saap.evaluation import perplexity as module
from saap.evaluation.perplexity import perplexity, token_nll

VOCABULARY = 11


class NextToken(nn.Module):
    """Gives the true successor (id + 1) the logit `sharpness`, all others 0; answers in the form that is asked for."""

    def __init__(self, sharpness: float, form: str = "tensor") -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness, dtype=torch.float64))
        self.form = form
        self.dropout = nn.Dropout(0.5)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: Tensor) -> Tensor | tuple[Tensor, str]:
        self.shapes.append(tuple(input_ids.shape))
        logits = nn.functional.one_hot((input_ids + 1) % VOCABULARY, VOCABULARY) * self.sharpness
        logits = self.dropout(logits)
        return logits if self.form == "tensor" else (logits, "more")


@pytest.mark.parametrize("form", ["tensor", "tuple"])
def test_a_hand_worked_case(form):
    ids = np.arange(23) % VOCABULARY
    found = perplexity(NextToken(2.0, form), ids, window=5)
    nll = math.log(math.exp(2.0) + VOCABULARY - 1) - 2.0
    assert found.nll == pytest.approx(nll, abs=1e-12)
    assert found.value == pytest.approx(math.exp(nll), abs=1e-12)
    # four windows of 5 predict 4 each, the rest of 3 predicts 2
    assert (found.tokens, found.window) == (18, 5)


def test_windows_batches_and_what_is_left_over():
    model = NextToken(1.0)
    perplexity(model, torch.arange(31) % VOCABULARY, window=5, batch=4)
    assert model.shapes == [(4, 5), (2, 5)]
    model.shapes.clear()
    assert perplexity(model, torch.arange(100) % VOCABULARY, window=50, max_tokens=12).tokens == 11
    assert model.shapes == [(1, 12)]


def test_batch_and_chunk_sizes_do_not_change_the_value(monkeypatch):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    model = GPT2LMHeadModel(config).double()
    ids = torch.randint(VOCABULARY, (203,))
    one = perplexity(model, ids, window=20, batch=1)
    monkeypatch.setattr(module, "POSITIONS_PER_CHUNK", 7)
    many = perplexity(model, ids, window=20, batch=8)
    assert one.nll == pytest.approx(many.nll, abs=1e-12)
    assert one.text_digest == many.text_digest != perplexity(model, ids[:-1], window=20).text_digest


def test_a_large_vocabulary_gets_smaller_batches(monkeypatch):
    model = NextToken(1.0)
    model.config = GPT2Config(vocab_size=VOCABULARY)
    monkeypatch.setattr(module, "LOGITS_BYTES", 2 * 5 * VOCABULARY * 4)
    perplexity(model, torch.arange(20) % VOCABULARY, window=5, batch=4)
    assert model.shapes == [(2, 5), (2, 5)]


def test_dropout_is_off_and_training_flags_stay():
    model = NextToken(2.0).train()
    model.dropout.eval()
    ids = np.arange(23) % VOCABULARY
    assert perplexity(model, ids, window=5).nll == perplexity(model.eval(), ids, window=5).nll
    model.train()
    model.dropout.eval()
    perplexity(model, ids, window=5)
    assert model.training
    assert not model.dropout.training


def test_half_precision_logits_are_summed_in_full_precision():
    logits = torch.randn(500, 64, dtype=torch.float64).to(torch.bfloat16)
    targets = torch.randint(64, (500,))
    exact = -logits.double().log_softmax(-1).gather(1, targets[:, None]).sum()
    assert float(token_nll(logits, targets)) == pytest.approx(float(exact), rel=1e-6)


def test_a_collapsed_model_has_infinite_perplexity():
    assert perplexity(NextToken(-5000.0), np.arange(10), window=5).value == math.inf
    assert math.isnan(perplexity(NextToken(math.nan), np.arange(10), window=5).value)


@pytest.mark.parametrize(("tokens", "window"), [(1, 512), (0, 512), (10, 1)])
def test_too_little_to_predict_is_refused(tokens, window):
    with pytest.raises(CalibrationError, match="at least 2 tokens"):
        perplexity(NextToken(1.0), np.arange(tokens), window=window)


def test_a_stride_predicts_each_token_once_with_the_context_before_it():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    model = GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(VOCABULARY, (53,))
    expected, seen = 0.0, 1
    for begin in range(0, 53, 4):
        end = min(begin + 10, 53)
        logits = model(ids[None, begin:end]).logits[0].log_softmax(-1)
        expected -= sum(float(logits[at - 1 - begin, ids[at]]) for at in range(seen, end))
        seen = end
    found = perplexity(model, ids, window=10, stride=4)
    assert (found.tokens, found.window, found.stride) == (52, 10, 4)
    assert found.nll == pytest.approx(expected / 52, abs=1e-12)


@pytest.mark.parametrize("stride", [0, 11])
def test_a_stride_outside_the_window_is_refused(stride):
    with pytest.raises(CalibrationError, match="stride"):
        perplexity(NextToken(1.0), np.arange(30), window=10, stride=stride)
