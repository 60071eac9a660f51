from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saap.core.errors import CalibrationError
from saap.data.windows import SampleRequest, parts_by_weight, place, share_rows


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def covered(starts: list[int], length: int) -> set[int]:
    return {token for start in starts for token in range(start, start + length)}


def test_parts_by_weight():
    assert parts_by_weight(8, [1, 1, 1]) == [3, 3, 2]
    assert parts_by_weight(1, [1, 2, 1]) == [0, 1, 0]
    assert parts_by_weight(50, [1, 1, 2, 2]) == [8, 8, 17, 17]


@given(
    sizes=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9), st.booleans()), min_size=1, max_size=4),
    spare=st.integers(0, 40),
    seed=st.integers(0, 2**32),
)
def test_windows_that_fit_never_overlap(sizes, spare, seed):
    requests = [SampleRequest(str(index), *size[:2], held_out=size[2]) for index, size in enumerate(sizes)]
    tokens = sum(one.tokens for one in requests) + spare
    starts = place("text", tokens, requests, generator(seed))
    used = [token for one in requests for start in starts[one.name] for token in range(start, start + one.length)]
    assert len(used) == len(set(used)) == tokens - spare
    assert all(0 <= token < tokens for token in used)
    assert [len(starts[one.name]) for one in requests] == [one.sequences for one in requests]


def test_every_place_is_reached():
    firsts = {place("text", 10, [SampleRequest("a", 1, 4)], generator(seed))["a"][0] for seed in range(200)}
    assert firsts == set(range(7))


def test_a_short_text_is_shared_but_never_with_what_is_held_out():
    requests = [
        SampleRequest("scored", 10, 8),
        SampleRequest("held", 4, 8, held_out=True),
        SampleRequest("refit", 5, 16),
    ]
    starts = place("text", 120, requests, generator())
    held, scored, refit = (
        covered(starts[name], length) for name, length in (("held", 8), ("scored", 8), ("refit", 16))
    )
    assert len(held) == 32
    assert len(scored) == len(refit) == 80
    assert not held & (scored | refit)
    assert scored & refit


def test_a_set_may_be_smaller_where_the_request_allows_it():
    requests = [SampleRequest("held", 4, 8, held_out=True), SampleRequest("refit", 100, 16, at_least=5)]
    assert len(place("text", 120, requests, generator())["refit"]) == 5
    with pytest.raises(CalibrationError, match=r"text has 111 tokens, but at least 112 are needed \(held 4 x 8, refit"):
        place("text", 111, requests, generator())


def test_a_held_out_set_leaves_the_others_what_they_insist_on():
    requests = [SampleRequest("scored", 10, 8), SampleRequest("held", 4, 8, held_out=True, at_least=1)]
    starts = place("text", 100, requests, generator())
    assert {name: len(found) for name, found in starts.items()} == {"scored": 10, "held": 2}
    assert not covered(starts["held"], 8) & covered(starts["scored"], 8)
    with pytest.raises(CalibrationError, match="at least 88 are needed"):
        place("text", 87, requests, generator())


def test_a_held_out_set_leaves_later_ones_what_they_insist_on():
    requests = [
        SampleRequest("scored", 2, 8),
        SampleRequest("first", 10, 8, held_out=True, at_least=1),
        SampleRequest("second", 10, 8, held_out=True, at_least=3),
    ]
    starts = place("text", 60, requests, generator())
    assert {name: len(found) for name, found in starts.items()} == {"scored": 2, "first": 2, "second": 3}
    with pytest.raises(CalibrationError, match="at least 48 are needed"):
        place("text", 47, requests, generator())


def test_a_text_that_is_too_short_names_tokens_needed_and_found():
    with pytest.raises(CalibrationError, match=r"short has 1,000 tokens, but at least 1,280 are needed"):
        place("short", 1000, [SampleRequest("samples", 10, 128)], generator())
    with pytest.raises(CalibrationError, match="at least 16 are needed"):
        place("short", 10, [SampleRequest("held", 2, 8, held_out=True)], generator())


def rows_of(tokens: np.ndarray, width: int) -> set[int]:
    return {int(token) // width for token in tokens.reshape(-1)}


def test_rows_go_to_the_sets_whole_where_there_are_enough():
    ids = np.arange(40 * 8).reshape(40, 8)
    requests = [
        SampleRequest("scored", 10, 8),
        SampleRequest("held", 4, 4, held_out=True),
        SampleRequest("refit", 5, 16),
    ]
    sets = share_rows(ids, requests, generator())
    assert {name: tokens.shape for name, tokens in sets.items()} == {
        "scored": (10, 8),
        "held": (4, 4),
        "refit": (10, 8),
    }
    owners = [rows_of(tokens, 8) for tokens in sets.values()]
    assert sum(map(len, owners)) == len(set.union(*owners)) == 22


def test_few_rows_are_shared_but_never_with_what_is_held_out():
    ids = np.arange(12 * 8).reshape(12, 8)
    requests = [
        SampleRequest("scored", 50, 8),
        SampleRequest("held", 16, 8, held_out=True),
        SampleRequest("refit", 64, 16),
    ]
    sets = share_rows(ids, requests, generator())
    assert {name: tokens.shape for name, tokens in sets.items()} == {"scored": (9, 8), "held": (3, 8), "refit": (9, 8)}
    assert not rows_of(sets["held"], 8) & (rows_of(sets["scored"], 8) | rows_of(sets["refit"], 8))


def test_long_rows_are_cut_first():
    sets = share_rows(
        np.arange(1000)[None], [SampleRequest("a", 3, 100), SampleRequest("b", 2, 100, held_out=True)], generator()
    )
    assert sets["a"].shape == (3, 100)
    assert (np.diff(sets["a"], axis=1) == 1).all()
    assert not set(sets["a"].reshape(-1)) & set(sets["b"].reshape(-1))


def test_too_few_rows_are_refused():
    with pytest.raises(CalibrationError, match=r"only 2 image-text pairs\. Give at least 3"):
        share_rows(
            np.zeros((2, 8), dtype=np.int64),
            [SampleRequest("a", 2, 8), SampleRequest("b", 2, 8, held_out=True)],
            generator(),
            "image-text pairs",
        )
