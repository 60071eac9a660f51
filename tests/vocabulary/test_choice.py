"""Which tokens stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saap.core.errors import TargetError
from saap.vocabulary.choice import keep_tokens, likeness, order_by_use, size_for_coverage, with_needs
from saap.vocabulary.scripts import NONE, PART, by_script, script_of

PARTS = {4: (0, 1), 5: (2, 4), 6: None}


def needs(token: int) -> tuple[int, ...] | None:
    return PARTS.get(token, ())


def test_a_token_brings_what_it_is_built_from():
    assert with_needs([5], needs) == {2, 4, 5}
    assert keep_tokens([5, 4, 3], [7], needs, 4) == (2, 4, 5, 7)


def test_a_token_that_does_not_fit_makes_room_for_smaller_ones():
    assert keep_tokens([5, 3, 0, 1], [7], needs, 3) == (0, 3, 7)


def test_tokens_that_are_never_produced_leave_their_room_to_others():
    assert keep_tokens([6, 3, 2], [7], needs, 3) == (2, 3, 7)
    assert keep_tokens([6], [7], needs, 3) == (7,)


def test_the_number_is_a_multiple_of_the_step():
    assert len(keep_tokens(range(100), [], lambda token: (), 70, 64)) == 64


def test_a_size_below_the_required_tokens_is_refused():
    with pytest.raises(TargetError, match=r"3 tokens have to stay, which needs 4 rows, more than the 3.*least 4"):
        keep_tokens(range(9), [0, 1, 2], needs, 3, 4)


def test_the_least_number_of_tokens_that_covers_every_text():
    text, other = np.array([50, 30, 15, 5, 0, 0, 0, 0]), np.array([0, 0, 0, 100, 0, 0, 0, 0])
    order = [0, 1, 2, 3]
    assert size_for_coverage(order, [], needs, {"en": text}, 0.8) == 2
    assert size_for_coverage(order, [], needs, {"en": text}, 0.95) == 3
    assert size_for_coverage(order, [7], needs, {"en": text, "code": other}, 0.8) == 5


def languages_in_space() -> tuple[torch.Tensor, np.ndarray]:
    """Rows of three languages of 100 tokens, each around a direction of its own, and the language of each."""
    generator = torch.Generator().manual_seed(0)
    language = np.arange(300) // 100
    centres = 3 * torch.eye(3, 16)[torch.from_numpy(language)]
    return centres + torch.randn(300, 16, generator=generator), language


def test_unseen_tokens_are_ordered_by_the_language_of_their_rows():
    rows, language = languages_in_space()
    counts = {"first": np.where(np.arange(300) < 30, 5, 0)}
    order = order_by_use(counts, likeness(rows, counts))
    assert set(order[:30]) == set(range(30))  # those that were seen
    assert np.mean(language[order[30:100]] == 0) > 0.8


def test_a_small_text_counts_like_a_large_one():
    rows, language = languages_in_space()
    counts = {"large": np.where(language == 0, 1000, 0), "small": np.where(language == 1, 1, 0)}
    order = order_by_use(counts, likeness(rows, counts))
    assert set(language[order[:200]]) == {0, 1}
    assert np.sum(language[order[:150]] == 1) > 30


def test_a_text_that_uses_nothing_or_everything_tells_nothing():
    rows, _ = languages_in_space()
    found = likeness(rows, {"none": np.zeros(300, np.int64), "every": np.ones(300, np.int64)})
    assert not found["none"].any()
    assert not found["every"].any()


def test_wide_rows_are_projected():
    generator = torch.Generator().manual_seed(0)
    side = torch.arange(200) < 100
    rows = torch.randn(200, 1500, generator=generator) + torch.where(side, 3.0, -3.0)[:, None]
    found = likeness(rows, {"a": (torch.arange(200) < 50).long().numpy()})["a"]
    assert found[50:100].min() > found[100:].max()


def test_scripts():
    assert [script_of(text) for text in (" the", "Привет", "你", "42", "�", "")] == [
        "latin", "cyrillic", "cjk", NONE, PART, NONE,
    ]  # fmt: skip
    assert by_script(["a", "b", "1"]) == {"latin": 2, NONE: 1}
