from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.data.byte_tokenizer import byte_tokenizer

from saap.core.errors import CalibrationError
from saap.data.samples import calibration_set, draw_sets, token_stream
from saap.data.texts import KINDS, read_documents
from saap.data.windows import SampleRequest

TOKENIZER = byte_tokenizer()
REQUESTS = (
    SampleRequest("scored", 10, 16),
    SampleRequest("held", 4, 16, held_out=True),
    SampleRequest("refit", 6, 32),
)


def numbered(path: Path, letter: str, count: int = 400) -> str:
    """A file of which every window of 12 bytes is unique."""
    path.write_text("".join(f"{letter}{index:05d}" for index in range(count)), encoding="utf-8")
    return str(path)


def written(tokens: np.ndarray) -> list[str]:
    return [TOKENIZER.decode(row) for row in tokens]


def test_a_stream_is_the_joined_text_without_special_tokens():
    assert TOKENIZER.decode(token_stream(["One.", "Two."], TOKENIZER)) == "One.\n\nTwo."


def test_a_stream_is_whole_where_the_tokenizer_was_left_to_shorten_texts():
    plain, shortening = byte_tokenizer(), byte_tokenizer()
    shortening.backend_tokenizer.enable_truncation(4)
    expected = plain("One.\n\nTwo.", add_special_tokens=False)["input_ids"]
    for tokenizer in (plain, shortening):
        assert token_stream(["One.", "Two."], tokenizer).tolist() == expected


def test_sets_are_windows_of_the_text_and_the_seed_decides(tmp_path):
    source = numbered(tmp_path / "a.txt", "a")
    text = Path(source).read_text(encoding="utf-8")
    sets = draw_sets([source], TOKENIZER, REQUESTS, seed=3)
    assert {name: one.tokens.shape for name, one in sets.items()} == {
        "scored": (10, 16),
        "held": (4, 16),
        "refit": (6, 32),
    }
    windows = [window for one in sets.values() for window in written(one.tokens)]
    places = [token for window in windows for token in range(text.index(window), text.index(window) + len(window))]
    assert len(places) == len(set(places))
    again = draw_sets([source], TOKENIZER, REQUESTS, seed=3)
    other = draw_sets([source], TOKENIZER, REQUESTS, seed=4)
    assert all(sets[name].digest == again[name].digest != other[name].digest for name in sets)
    assert sets["held"].sources == (source,)
    assert sets["held"].seed == 3


def test_each_source_gives_an_equal_part(tmp_path):
    sources = [numbered(tmp_path / "a.txt", "a"), numbered(tmp_path / "b.txt", "b")]
    sets = draw_sets(sources, TOKENIZER, REQUESTS, seed=0)
    for one in sets.values():
        assert sum("a" in window for window in written(one.tokens)) == len(one.tokens) // 2
    first_half = written(sets["scored"].tokens)[:5]
    assert 0 < sum("a" in window for window in first_half) < 5


def test_each_kind_of_the_mixture_gives_its_part():
    tokens = calibration_set("mixed", TOKENIZER, samples=36, length=64, seed=0).tokens
    text = {kind: token_stream(read_documents(kind), TOKENIZER).astype(np.uint8).tobytes() for kind in KINDS}
    found = [sum(window.astype(np.uint8).tobytes() in text[kind] for window in tokens) for kind in KINDS]
    assert found == list(KINDS.values())


def test_texts_themselves_are_one_source():
    texts = [f"This is sentence number {index} of many. " * 3 for index in range(40)]
    tokens = calibration_set(texts, TOKENIZER, samples=20, length=32, seed=0)
    assert tokens.sources == ("given texts",)
    assert all(window in "\n\n".join(texts) for window in written(tokens.tokens))


def test_a_long_text_without_spaces_is_a_source():
    tokens = calibration_set(["\u6c49\u5b57" * 400], TOKENIZER, samples=4, length=32, seed=0)
    assert tokens.sources == ("given texts",)


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor, lambda ids: ids.tolist()])
def test_token_ids_are_taken_whole(convert):
    ids = np.arange(60).reshape(6, 10)
    assert (calibration_set(convert(ids), None, samples=50, length=128, seed=0).tokens == ids).all()


def test_token_ids_are_dealt_to_the_sets():
    sets = draw_sets(np.arange(60).reshape(6, 10), None, REQUESTS, seed=0)
    assert len(sets["held"].tokens) == 1
    assert not set(sets["held"].tokens.reshape(-1)) & set(sets["scored"].tokens.reshape(-1))


@pytest.mark.parametrize("ids", [np.zeros(5, dtype=int), np.zeros((2, 3)), np.zeros((2, 1), dtype=int), [[1, 2], [3]]])
def test_token_ids_of_another_shape_or_type_are_refused(ids):
    with pytest.raises(CalibrationError, match=r"token ids have .* Give integers of shape \(samples, length\)"):
        calibration_set(ids, None, samples=2, length=2, seed=0)


def test_a_text_without_a_tokenizer_is_refused():
    with pytest.raises(CalibrationError, match=r"no tokenizer.*pass `tokenizer` in Python"):
        calibration_set("novels", None, samples=2, length=8, seed=0)


def test_a_short_text_is_refused_with_both_counts(tmp_path):
    (tmp_path / "short.txt").write_text("x" * 100, encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"short\.txt has 100 tokens, but at least 6,400 are needed"):
        calibration_set(tmp_path / "short.txt", TOKENIZER, samples=50, length=128, seed=0)


def test_ids_outside_the_embedding_are_refused_with_both_sizes():
    with pytest.raises(CalibrationError, match=r"\(256 tokens\) gave id \d+, but the model's embedding has 20 rows"):
        calibration_set("novels", TOKENIZER, samples=2, length=8, seed=0, vocabulary=20)
    for outside in (20, -1):
        with pytest.raises(CalibrationError, match=f"token ids given gave id {outside}"):
            calibration_set([[1, outside]], None, samples=1, length=2, seed=0, vocabulary=20)
        with pytest.raises(CalibrationError, match=f"token ids given gave id {outside}"):
            calibration_set([[1, outside]], TOKENIZER, samples=1, length=2, seed=0, vocabulary=20)


def test_an_empty_calibration_is_refused():
    with pytest.raises(CalibrationError, match="calibration is empty"):
        draw_sets([], TOKENIZER, REQUESTS, seed=0)
