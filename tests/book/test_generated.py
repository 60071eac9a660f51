from __future__ import annotations

import pytest
import torch
from lab.generated import random_starts, sample_from_model
from tests.data.byte_tokenizer import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, eos_token_id=2
    )
    return LlamaForCausalLM(config).eval()


def test_the_seed_decides_and_the_global_state_stays(model):
    state = torch.get_rng_state()
    first = sample_from_model(model, sequences=5, length=12, batch=2, seed=1, starts=[[1]])
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    again = sample_from_model(model, sequences=5, length=12, batch=2, seed=1, starts=[[1]])
    other = sample_from_model(model, sequences=5, length=12, batch=2, seed=2, starts=[[1]])
    assert first.shape == (5, 12)
    assert (first == again).all()
    assert (first != other).any()
    assert (first[:, 0] == 1).all()


def test_it_samples_the_models_own_distribution(model):
    """With the head's bias towards one token switched by the model's defaults, the shares must not move."""
    model.generation_config.update(top_k=1, repetition_penalty=5.0)
    tokens = sample_from_model(model, sequences=4000, length=2, batch=4000, seed=0, starts=[[1]])[:, 1]
    with torch.no_grad():
        expected = model(torch.tensor([[1]])).logits[0, -1].softmax(-1)
    shares = torch.bincount(torch.from_numpy(tokens), minlength=8) / 4000
    assert (shares - expected).abs().max() < 0.03


def test_it_goes_on_after_the_end_token(model):
    tokens = sample_from_model(model, sequences=3, length=40, batch=2, seed=0, starts=[[1]])
    after_the_end = [row[list(row).index(2) + 1 :] for row in tokens if 2 in row]
    assert any(len(set(rest.tolist())) > 1 for rest in after_the_end)  # padding would be one id


def test_a_chat_starts_with_the_users_turn(model):
    tokens = sample_from_model(model, sequences=2, length=10, batch=2, seed=0, starts=[(3, 4, 5)])
    assert (tokens[:, :3] == [3, 4, 5]).all()


def test_random_starts_are_ordinary_tokens_and_follow_the_seed():
    tokenizer = byte_tokenizer()
    starts = random_starts(tokenizer, sequences=50, seed=0)
    assert starts == random_starts(tokenizer, sequences=50, seed=0)
    assert starts != random_starts(tokenizer, sequences=50, seed=1)
    assert not {start[0] for start in starts} & set(tokenizer.all_special_ids)
    assert len({start[0] for start in starts}) > 10
