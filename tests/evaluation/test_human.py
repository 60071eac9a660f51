from __future__ import annotations

import pytest

from saap.core.errors import EvaluationError
from saap.evaluation.human import (
    KitKey,
    Rating,
    build_kit,
    judge,
    key_path,
    krippendorff_alpha,
    read_key,
    read_ratings,
)

ANSWERS = {
    "dense-model": {"Why?": "Because.", "How <b>?": "So & so."},
    "pruned-model": {"Why?": "Perhaps.", "How <b>?": "Somehow."},
}


def test_the_page_is_blind_and_the_key_names_every_answer() -> None:
    kit = build_kit(ANSWERS, seed=3)
    assert "dense-model" not in kit.page
    assert "pruned-model" not in kit.page
    assert "So &amp; so." in kit.page
    assert "http" not in kit.page.replace("http-equiv", "")
    assert sorted(kit.key.items) == ["1", "2"]
    assert all(sorted(letters.values()) == sorted(ANSWERS) for letters in kit.key.items.values())
    assert kit.page == build_kit(ANSWERS, seed=3).page
    orders = {tuple(build_kit(ANSWERS, seed=seed).key.items["1"].values()) for seed in range(20)}
    assert len(orders) == 2


def test_answers_must_be_to_the_same_prompts() -> None:
    with pytest.raises(EvaluationError, match="different prompts"):
        build_kit({"a": {"x": "1"}, "b": {"y": "1"}})
    with pytest.raises(EvaluationError, match="two models"):
        build_kit({"a": {"x": "1"}})


def rating(rater: str, item: str, system: str, coherence: int, accuracy: int = 3) -> Rating:
    return Rating(rater=rater, item=item, system=system, scores={"coherence": coherence, "accuracy": accuracy})


def test_win_rates_count_ties_as_half_and_average_raters() -> None:
    ratings = [
        rating("x", "1", "a", 5), rating("x", "1", "b", 1),  # a wins
        rating("x", "2", "a", 2), rating("x", "2", "b", 2),  # a tie
        rating("x", "3", "a", 4), rating("x", "3", "b", 2),
        rating("y", "3", "a", 1), rating("y", "3", "b", 5),  # means 2.5 and 3.5: b wins
    ]  # fmt: skip
    found = judge(ratings)
    assert (found["raters"], found["items"]) == (2, 3)
    wins = found["coherence"]["win_rate"]
    assert wins["a over b"]["value"] == pytest.approx(0.5)
    assert wins["a over b"]["value"] + wins["b over a"]["value"] == pytest.approx(1)
    assert 0 <= wins["a over b"]["low"] <= 0.5 <= wins["a over b"]["high"] <= 1
    assert found["coherence"]["mean"]["a"]["value"] == pytest.approx((5 + 2 + 2.5) / 3)
    assert found["accuracy"]["win_rate"]["a over b"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert found["accuracy"]["agreement"] is None


def test_alpha_by_hand() -> None:
    # values 1 1 | 2 3 over two units: observed (0 + 2 * 1) / 4; expected from all pairs of 1 1 2 3
    pairs = [(1, 1), (1, 2), (1, 3), (1, 2), (1, 3), (2, 3)]
    expected = 2 * sum((a - b) ** 2 for a, b in pairs) / (4 * 3)
    assert krippendorff_alpha([{"x": 1, "y": 1}, {"x": 2, "y": 3}]) == pytest.approx(1 - 0.5 / expected)
    assert krippendorff_alpha([{"x": 1, "y": 1}, {"x": 4, "y": 4}]) == 1.0
    assert krippendorff_alpha([{"x": 1}, {"x": 4}]) is None


def test_ratings_come_back_through_the_key(tmp_path) -> None:
    kit = build_kit(ANSWERS)
    letters = {system: letter for letter, system in kit.key.items["1"].items()}
    page = tmp_path / "kit.html"
    key_path(page).write_text(kit.key.model_dump_json())
    key = read_key(key_path(page))
    table = tmp_path / "r.csv"
    header = "kit,rater,item,answer,coherence,accuracy\n"
    table.write_text(header + f'{key.kit},"me, myself",1,{letters["pruned-model"]},4,2\n')
    (found,) = read_ratings(table, key)
    assert found == rating("me, myself", "1", "pruned-model", 4, 2)
    for line, reason in [
        ("other,me,1,A,4,2", "belongs to kit other"),
        (f"{key.kit},me,1,A,9,2", "not one of 1 to 5"),
        (f"{key.kit},me,1,Z,4,2", "Z"),
        (f"{key.kit},me,1,A,,2", "line 2"),
    ]:
        table.write_text(header + line + "\n")
        with pytest.raises(EvaluationError, match="line 2") as caught:
            read_ratings(table, key)
        assert reason in str(caught.value)
    table.write_text(header)
    with pytest.raises(EvaluationError, match="has no ratings"):
        read_ratings(table, key)
    with pytest.raises(EvaluationError, match="no key"):
        read_key(table)


def test_a_key_is_a_strict_record() -> None:
    assert KitKey(kit="a", systems=("x",), items={}).kit == "a"
