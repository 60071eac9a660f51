from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from lab.training import FAMILIES, TRIAL, batches, configuration, make_tokenizer, rate_at, train
from transformers import AutoModelForCausalLM


def test_the_rate_rises_and_then_falls_to_a_tenth():
    rates = [rate_at(step, 200, 1.0) for step in range(200)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_batches_are_windows_of_the_text_and_fixed_by_the_seed():
    size = dataclasses.replace(TRIAL, steps=2, batch=3, length=5)
    tokens = np.arange(50)
    found = list(batches(tokens, size, seed=1))
    assert [tuple(batch.shape) for batch in found] == [(3, 5), (3, 5)]
    assert all((batch.diff(dim=1) == 1).all() for batch in found)
    assert all(torch.equal(a, b) for a, b in zip(found, batches(tokens, size, seed=1), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_sizes_and_learns(family):
    size = dataclasses.replace(TRIAL, steps=30, length=16, batch=8)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration(family, size, vocabulary=32))
    assert model.config.model_type == family
    assert model.get_input_embeddings().weight.shape == (32, size.width)
    losses = train(model, np.arange(400) % 7, size, seed=0)
    assert np.mean(losses[-5:]) < 0.7 * losses[0]
    assert not model.training


def test_the_tokenizer_gives_the_text_back():
    text = "The lighthouse keeper wrote: “naïve”.\n\nThen he slept."
    tokenizer = make_tokenizer(text * 20, vocabulary=300)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) <= 300
