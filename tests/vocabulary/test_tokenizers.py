"""The cut of a tokenizer: the same tokens wherever they are kept, and any text can still be written."""

from __future__ import annotations

import json
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.vocabulary.tokenizers_made_here import MAKERS, SPECIAL, TEXTS, fast, made
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saap.core.errors import ModelError
from saap.vocabulary.choice import keep_tokens
from saap.vocabulary.cut_tokenizer import cut_tokenizer, renumbered
from saap.vocabulary.tokens import TokenTable, described, token_table

KINDS = tuple(MAKERS)
WRITES_ANYTHING = ("byte_level", "whole_words", "byte_fallback", "unigram_with_bytes")
SEEDS = st.integers(0, 3)


@cache
def table_of(kind: str) -> TokenTable:
    tokenizer = fast(kind)
    return token_table(described(tokenizer), len(tokenizer))


@cache
def cut_in_half(kind: str, seed: int) -> tuple[Any, Any, tuple[int, ...]]:
    """A tokenizer, the same with some of its tokens, and their ids: other ones for each seed."""
    tokenizer, table = fast(kind), table_of(kind)
    order = np.random.default_rng(seed).permutation(len(table.contents))
    fixed = len(table.fixed)
    kept = keep_tokens(order, table.fixed, table.needs, fixed + (len(table.contents) - fixed) * 2 // 3)
    return tokenizer, cut_tokenizer(tokenizer, kept), kept


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def words_of(text: str) -> list[str]:
    lines = text.split("\n")
    words = [word for line in lines for word in line.split(" ")]
    return [part for part in (*lines, *words, *(text[at : at + 2] for at in range(0, len(text), 2))) if part]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_of_kept_tokens_gets_the_same_tokens(kind, language, seed):
    tokenizer, cut, kept = cut_in_half(kind, seed)
    new, compared = renumbered(kept), 0
    for text in words_of(TEXTS[language]):
        before = ids(tokenizer, text)
        if new.keys() >= set(before):
            compared += 1
            assert ids(cut, text) == [new[token] for token in before], text
    assert compared > 5


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_real_text_reads_as_before(kind, language):
    tokenizer, cut, _ = cut_in_half(kind, 0)
    text = TEXTS[language]
    assert cut.decode(ids(cut, text)) == tokenizer.decode(ids(tokenizer, text))
    assert cut.unk_token_id not in ids(cut, text) or tokenizer.unk_token_id in ids(tokenizer, text)


@settings(max_examples=60)
@given(text=st.text(), seed=SEEDS, kind=st.sampled_from(WRITES_ANYTHING))
@example(text="\U0001f9d1‍\U0001f680 ﷽ \x00\x7f 你好 ё́", seed=0, kind="byte_fallback")
def test_arbitrary_unicode_round_trips(text, seed, kind):
    tokenizer, cut, kept = cut_in_half(kind, seed)
    before, after = ids(tokenizer, text), ids(cut, text)
    assert cut.decode(after, skip_special_tokens=False) == tokenizer.decode(before, skip_special_tokens=False)
    if kind in ("byte_level", "byte_fallback"):
        assert cut.decode(after, skip_special_tokens=False) == text
    if set(kept) >= set(before):
        assert after == [renumbered(kept)[token] for token in before]


@settings(max_examples=60)
@given(text=st.text(), seed=SEEDS, kind=st.sampled_from(["unigram", "word_piece"]))
def test_what_could_be_written_still_can_be(text, seed, kind):
    tokenizer, cut, _ = cut_in_half(kind, seed)
    if tokenizer.unk_token_id not in ids(tokenizer, text):
        assert cut.unk_token_id not in ids(cut, text)
        assert cut.decode(ids(cut, text)) == tokenizer.decode(ids(tokenizer, text))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_follow_the_old_order(kind):
    tokenizer, cut, kept = cut_in_half(kind, 0)
    assert len(cut) == len(kept) < len(tokenizer)
    assert cut.convert_ids_to_tokens(list(range(len(kept)))) == tokenizer.convert_ids_to_tokens(list(kept))
    assert cut.all_special_tokens == tokenizer.all_special_tokens
    assert cut("a b").input_ids[:1] == [cut.bos_token_id] or tokenizer("a b").input_ids[:1] != [tokenizer.bos_token_id]


@pytest.mark.parametrize("kind", KINDS)
def test_the_cut_tokenizer_survives_its_folder(kind, tmp_path):
    _, cut, _ = cut_in_half(kind, 1)
    cut.save_pretrained(tmp_path)
    opened = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert opened.get_vocab() == cut.get_vocab()
    assert opened(TEXTS["french"]).input_ids == cut(TEXTS["french"]).input_ids


def test_special_tokens_of_the_template_get_their_new_ids():
    tokenizer = fast("byte_fallback")
    table = table_of("byte_fallback")
    description = json.loads(made("byte_fallback"))
    assert description["post_processor"]["special_tokens"]["<s>"]["ids"] == [1]
    kept = keep_tokens([], table.fixed, table.needs, len(table.fixed))
    assert cut_tokenizer(tokenizer, kept)("").input_ids == [kept.index(1)]


def test_a_token_needs_all_that_it_is_merged_from():
    table = table_of("byte_level")
    contents = list(table.contents)
    the = contents.index("Ġthe")
    assert {contents[part] for part in table.needs(the)} >= {"Ġ", "t", "h", "e"}
    assert all(table.needs(contents.index(letter)) == () for letter in "the")


def test_tokens_that_no_text_produces_are_not_kept():
    inner = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "ba": 3}, merges=[("a", "b")]))
    table = token_table(described(PreTrainedTokenizerFast(tokenizer_object=inner)), 4)
    assert table.needs(2) == (0, 1)
    assert table.needs(3) is None
    assert keep_tokens([3, 2], table.fixed, table.needs, 4) == (0, 1, 2)


def test_added_tokens_and_fallbacks_always_stay():
    table = table_of("byte_fallback")
    assert {table.contents.index(content) for content in (*SPECIAL, "<0x00>", "<0xFF>")} <= table.fixed
    assert table.contents.index("▁") in table.fixed  # the decoder writes a space for it
    assert table.contents.index("é") not in table.fixed  # its bytes are there
    letters = {index for index, content in enumerate(table_of("unigram").contents) if len(content or "") == 1}
    assert letters <= table_of("unigram").fixed


def test_rows_without_a_token_are_no_tokens():
    tokenizer = fast("byte_level")
    table = token_table(described(tokenizer), len(tokenizer) + 5)
    assert table.tokens == len(tokenizer)
    assert table.contents[-5:] == (None,) * 5


def test_an_added_token_without_a_row_is_left_out():
    tokenizer = fast("byte_level")
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    table = token_table(described(tokenizer), rows)
    cut = cut_tokenizer(tokenizer, keep_tokens(range(rows), table.fixed, table.needs, 600))
    assert "<image>" not in cut.get_vocab()
    assert cut.decode(ids(cut, "an <image> here")) == "an <image> here"


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ModelError, match=r"The tokenizer SimpleNamespace has no tokenizer\.json"):
        described(SimpleNamespace())
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match=r"of type WordLevel.*BPE, Unigram, WordPiece"):
        described(PreTrainedTokenizerFast(tokenizer_object=words))
    suffixed = Tokenizer(models.BPE(vocab={"a</w>": 0}, merges=[], end_of_word_suffix="</w>"))
    with pytest.raises(ModelError, match="marks parts of words"):
        described(PreTrainedTokenizerFast(tokenizer_object=suffixed))


def test_a_tokenizer_of_another_model_is_refused():
    tokenizer = fast("byte_level")
    with pytest.raises(ModelError, match=r"The tokenizer has 3 tokens without a row in the model's embedding"):
        token_table(described(tokenizer), len(tokenizer) - 3)
