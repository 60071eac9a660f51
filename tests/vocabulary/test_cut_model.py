"""The cut of a model's rows and of the ids in its settings."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GPTJConfig, GPTJForCausalLM, LlamaConfig, LlamaForCausalLM

from saap.core.errors import ModelError, UnsupportedModelError
from saap.evaluation.perplexity import model_logits
from saap.vocabulary.cut_model import cut_rows, ids_in_settings

ROWS = 40
KEPT = (0, 2, 3, 5, 8, 13, 21, 34, 39)


def llama(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=2, eos_token_id=[3, 13], pad_token_id=39, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_kept_tokens(tied):
    model = llama(tied=tied)
    before = copy.deepcopy(model)
    cut_rows(model, KEPT, model_logits)
    old, new = torch.tensor([KEPT]), torch.arange(len(KEPT))[None]
    assert torch.equal(model.lm_head.weight, before.lm_head.weight[list(KEPT)])
    # Products of other sizes may round differently.
    torch.testing.assert_close(model(new).logits, before(old).logits[..., list(KEPT)], rtol=0, atol=1e-6)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert model.config.vocab_size == model.lm_head.out_features == len(KEPT)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_bias_of_the_head_is_cut_with_it():
    torch.manual_seed(0)
    config = GPTJConfig(vocab_size=ROWS, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, bos_token_id=0, eos_token_id=2)
    model = GPTJForCausalLM(config).eval()
    nn.init.normal_(model.lm_head.bias)
    bias = model.lm_head.bias.detach().clone()
    cut_rows(model, KEPT, model_logits)
    assert torch.equal(model.lm_head.bias, bias[list(KEPT)])


def test_ids_in_the_settings_follow():
    model = llama(tied=True)
    settings = model.generation_config
    settings.suppress_tokens, settings.bad_words_ids, settings.forced_decoder_ids = [5, 8], [[3, 5], [21]], [[1, 8]]
    settings.sequence_bias = [[[13, 3], -2.0]]
    assert ids_in_settings(model, ROWS) == {2, 3, 13, 39, 5, 8, 21}
    cut_rows(model, KEPT, model_logits)
    config = model.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, [2, 5], 8)
    assert (settings.bos_token_id, settings.eos_token_id) == (1, [2, 5])
    assert settings.suppress_tokens == [3, 4]
    assert settings.bad_words_ids == [[2, 3], [6]]
    assert settings.forced_decoder_ids == [[1, 4]]
    assert settings.sequence_bias == [[[5, 2], -2.0]]
    assert model.model.embed_tokens.padding_idx == 8


def test_ids_without_a_row_stay_as_they_are():
    model = llama(tied=True)
    model.config.image_token_id, model.config.pad_token_id = ROWS + 3, -1
    cut_rows(model, KEPT, model_logits)
    assert (model.config.image_token_id, model.config.pad_token_id) == (ROWS + 3, -1)
    assert model.model.embed_tokens.padding_idx is None


def test_a_head_of_another_size_is_refused():
    model = llama(tied=False)
    model.lm_head = nn.Linear(16, ROWS + 8, bias=False)
    with pytest.raises(UnsupportedModelError, match=r"embedding has 40 rows, but the head's weight has 48"):
        cut_rows(model, KEPT, model_logits)


def test_a_model_without_an_embedding_is_refused():
    with pytest.raises(ModelError, match="Linear has no embedding"):
        cut_rows(nn.Linear(2, 2), (0,), model_logits)
