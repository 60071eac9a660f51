from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.recovery.test_train import interrupted, train
from tests.recovery.tiny import build

from saap.core.errors import ConfigurationError
from saap.data.training import Example
from saap.recovery.on_policy import BEGINNING, WRITTEN, continued
from saap.settings.recover import RecoverConfig


def example(tokens: int, prompt: int = 0) -> Example:
    ids = (np.arange(tokens) * 7) % 90 + 2
    return Example(ids.astype(np.int64), np.arange(tokens) >= max(1, prompt), prompt=prompt)


def ids_of(examples: list[Example]) -> list[list[int]]:
    return [one.tokens.tolist() for one in examples]


def test_the_model_writes_what_follows_each_beginning() -> None:
    model = build("llama_tied").float()
    examples = [example(80), example(80, prompt=40), example(80, prompt=12)]
    found = continued(model, examples, length=96, ends=(), seed=3)
    for before, after, kept in zip(examples, found, (BEGINNING, 40, 12), strict=True):
        assert len(after.tokens) == kept + 96 - 40
        np.testing.assert_array_equal(after.tokens[:kept], before.tokens[:kept])
        np.testing.assert_array_equal(after.learned, np.arange(len(after.tokens)) > 0)
    assert ids_of(found) == ids_of(continued(model, examples, length=96, ends=(), seed=3))
    assert ids_of(found) != ids_of(continued(model, examples, length=96, ends=(), seed=4))


def test_examples_without_room_for_an_answer_stay() -> None:
    model = build("llama_tied").float()
    examples = [example(20), example(BEGINNING), example(80, prompt=60), example(80)]
    found = continued(model, examples, length=96, ends=(), seed=3)
    assert [one is other for one, other in zip(examples, found, strict=True)] == [True, True, True, False]
    assert continued(model, examples[:3], length=96, ends=(), seed=3) == examples[:3]


def test_texts_of_short_sequences_begin_with_half_of_one() -> None:
    (found,) = continued(build("llama_tied").float(), [example(48)], length=48, ends=(), seed=3)
    assert found.prompt == 24
    assert len(found.tokens) == 48


def test_no_more_sequences_than_allowed_are_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, together = build("llama_tied").float(), []
    whole = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: together.append(len(given["input_ids"])) or whole(**given))
    found = continued(model, [example(80)] * 11, length=96, ends=(), seed=3)
    assert together == [8, 3]
    assert len({tuple(one) for one in ids_of(found)}) == 11


def test_padding_changes_nothing_that_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most likely tokens after a beginning are the same alone and beside a longer one."""
    model = build("llama_tied").float()
    sampled = model.generate
    monkeypatch.setattr(model, "generate", lambda **given: sampled(**{**given, "do_sample": False, "top_k": None}))
    short, long = example(60), example(96, prompt=48)
    alone = continued(model, [short], length=96, ends=(), seed=0)[0].tokens.tolist()
    beside = continued(model, [short, long], length=96, ends=(), seed=0)[0].tokens.tolist()
    assert beside == alone[: len(beside)]
    assert len(beside) == BEGINNING + 48


def test_writing_ends_with_an_end_of_text_token() -> None:
    model = build("llama_tied").float()
    (whole,) = continued(model, [example(40)], length=400, ends=(), seed=0)
    assert len(whole.tokens) == BEGINNING + WRITTEN
    end = int(whole.tokens[BEGINNING + 5])
    (short,) = continued(model, [example(40)], length=400, ends={end, 1}, seed=0)
    assert short.tokens[-1] in (end, 1)
    assert end not in short.tokens[BEGINNING:-1]
    assert len(short.tokens) <= BEGINNING + 6
    assert short.learned[-1]


def test_a_generation_configuration_changes_nothing() -> None:
    model = build("llama_tied").float()
    plain = continued(model, [example(40)], length=200, ends=(), seed=0)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.temperature = 0.01
    assert ids_of(continued(model, [example(40)], length=200, ends=(), seed=0)) == ids_of(plain)
    assert model.generation_config.repetition_penalty == 5.0


def test_unlikely_tokens_are_written_as_often_as_the_model_expects() -> None:
    """Sampling usually leaves out all but the 50 most likely ones."""
    model = build("llama_tied").float()
    start = Example(np.array([1, 1]), np.array([False, True]), prompt=1)
    written = [int(one.tokens[1]) for one in continued(model, [start] * 2000, length=2, ends=(), seed=0)]
    with torch.no_grad():
        expected = model(torch.tensor([[1]])).logits[0, -1].softmax(-1)
    unlikely = expected.argsort()[:-50]
    assert expected[unlikely].sum() > 0.1
    share = np.isin(written, unlikely.numpy()).mean()
    assert abs(share - float(expected[unlikely].sum())) < 0.04


def test_random_numbers_of_others_are_left_alone() -> None:
    model = build("llama_tied").float()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    continued(model, [example(40)], length=80, ends=(), seed=9)
    torch.testing.assert_close(torch.rand(3), expected)


@pytest.mark.parametrize("batch", [1, 4])
def test_only_the_end_of_the_training_is_on_policy(batch: int, tmp_path: Path) -> None:
    teacher = build("llama_tied").float()
    settings: dict[str, Any] = {"distillation": 1.0, "batch": batch, "micro_batch": 1, "length": 96}
    _, read = train(tmp_path / "read", teacher=teacher, **settings)
    _, written = train(tmp_path / "written", teacher=teacher, on_policy=0.5, **settings)
    same = [a.loss == b.loss for a, b in zip(read.points, written.points, strict=True)]
    assert same == [True] * 4 + [False] * 4


def test_an_interrupted_training_writes_the_same_again(tmp_path: Path) -> None:
    teacher = build("llama_tied").float()
    settings: dict[str, Any] = {"distillation": 1.0, "on_policy": 0.75, "length": 96, "teacher": teacher}
    _, whole = train(tmp_path / "whole", **settings)
    interrupted(tmp_path / "cut", **settings)
    _, resumed = train(tmp_path / "cut", **settings)
    for one, other in zip(whole.points, resumed.points, strict=True):
        assert abs(one.loss - other.loss) <= 1e-6


@pytest.mark.parametrize("given", [{"distillation": 0.5}, {"distillation": 0.0}, {"shard": True}])
def test_contradictions_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="--on-policy"):
        RecoverConfig(on_policy=0.5, **given)
