from __future__ import annotations

from experiments.method.calibration import GENERATED, Setting, random_starts, samples_of
from harness.experiment import Request
from lab.dense import opened
from tests.data.byte_tokenizer import byte_tokenizer
from tests.pipeline import tiny


def test_random_starts_are_ordinary_tokens_and_follow_the_seed() -> None:
    tokenizer = byte_tokenizer()
    starts, again, other = ([int(one.tokens[0]) for one in random_starts(tokenizer, 50, seed)] for seed in (0, 0, 1))
    assert starts == again != other
    assert not set(starts) & set(tokenizer.all_special_ids)
    assert len(set(starts)) > 10


def test_the_model_writes_samples_of_the_whole_length(tmp_path) -> None:
    settings = {
        "standard": [3, 24, GENERATED], "numbers of samples": [2], "lengths": [24], "kinds": [GENERATED],
    }  # fmt: skip
    request = Request(quick=True, work=tmp_path, results=tmp_path, settings=settings)
    with opened(str(tiny.folder(tmp_path / "tiny"))) as dense:
        found = samples_of(request, dense, Setting(2, 24, GENERATED), seed=1)
    assert found.tokens.shape == (3, 24)
    assert found.tokens[:, 0].tolist() == [int(one.tokens[0]) for one in random_starts(tiny.tokenizer(), 3, seed=1)]
