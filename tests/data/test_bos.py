"""Windows of text begin with the BOS token of tokenizers that put one before every text, everywhere the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import command
from tests.data.byte_tokenizer import CHAT_TEMPLATE, byte_tokenizer
from tests.pipeline import tiny
from torch import nn

from saap.data.samples import draw_sets, leading_ids, token_stream
from saap.data.training import training_data
from saap.data.windows import SampleRequest
from saap.evaluation.perplexity import perplexity
from saap.pipeline.shared.inputs import LoadedModel
from saap.pipeline.shared.tokens import draw_tokens
from saap.settings.prune import PruneConfig

PLAIN, LED = byte_tokenizer(), byte_tokenizer(bos=True)
BOS = LED.bos_token_id


def test_what_a_tokenizer_puts_before_texts() -> None:
    assert leading_ids(PLAIN) == ()
    assert leading_ids(LED) == (BOS,)
    assert leading_ids(LED, bos=False) == ()
    assert leading_ids(None) == ()


def test_samples_are_windows_of_the_text_after_the_token(tmp_path: Path) -> None:
    text = "".join(f"{index:05d}" for index in range(400))
    (tmp_path / "a.txt").write_text(text)
    requests = [SampleRequest("scored", 10, 16), SampleRequest("held", 4, 12, held_out=True)]
    drawn = draw_sets(str(tmp_path / "a.txt"), LED, requests, seed=0)
    for request in requests:
        tokens = drawn[request.name].tokens
        assert tokens.shape == (request.sequences, request.length)
        assert (tokens[:, 0] == BOS).all()
        assert all(LED.decode(row[1:]) in text for row in tokens)
    old = draw_sets(str(tmp_path / "a.txt"), LED, requests, seed=0, bos=False)
    same = draw_sets(str(tmp_path / "a.txt"), PLAIN, requests, seed=0)
    for name, one in old.items():
        assert np.array_equal(one.tokens, same[name].tokens)
    given = np.arange(2, 98).reshape(8, 12)
    assert BOS not in draw_sets(given, LED, requests, seed=0)["scored"].tokens


class Seen(nn.Module):
    """Remembers what it read; every token of the vocabulary is as likely."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.read: list[list[int]] = []

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.read += input_ids.tolist()
        return torch.zeros(*input_ids.shape, 50)


@pytest.mark.parametrize(("window", "stride"), [(5, None), (5, 2), (9, 4), (40, None), (4, 3)])
def test_every_token_of_a_text_is_predicted_once_in_windows_that_begin_with_it(window: int, stride: int | None) -> None:
    model = Seen()
    found = perplexity(model, np.arange(10, 33), window=window, stride=stride, leading=(BOS,))
    assert (found.tokens, found.leading) == (23, 1)
    assert all(row[0] == BOS and len(row) <= window for row in model.read)
    assert {token for row in model.read for token in row[1:]} == set(range(10, 33))
    assert all(row[1:] == list(range(row[1], row[1] + len(row) - 1)) for row in model.read)


def test_training_sequences_begin_with_it_and_do_not_learn_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh" * 100)
    made = training_data([tmp_path / "a.txt"], LED, length=32, held_out=1, seed=0)
    for one in (*made.train, *made.held_out):
        assert one.tokens[0] == BOS
        assert len(one.tokens) <= 32
        assert one.learned.tolist() == [False] + [True] * (len(one.tokens) - 1)
    old = training_data([tmp_path / "a.txt"], LED, length=32, held_out=1, seed=0, bos=False)
    assert not any(BOS in one.tokens for one in old.train)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, "{{ bos_token }}" + CHAT_TEMPLATE])
def test_conversations_begin_with_it_once(tmp_path: Path, template: str) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"How {n}?"}, {"role": "assistant", "content": f"So {n}."}]}
        for n in range(12)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = byte_tokenizer(chat_template=template, bos=True)
    for one in training_data([tmp_path / "chat.jsonl"], tokenizer, length=200, held_out=1, seed=0).train:
        assert one.tokens.tolist().count(BOS) == 1
        assert one.tokens[0] == BOS
        assert not one.learned[0]


def test_all_sets_of_a_run(tmp_path: Path) -> None:
    model = tiny.model()
    loaded = LoadedModel(model=model, tokenizer=LED, ref=None, dtype=torch.float32, owned=True)  # type: ignore[arg-type]
    config = PruneConfig(pruning_ratios=(0.2,), samples=4, sample_length=16, refit_tokens=1024)
    tokens = draw_tokens(loaded, config, "novels")
    assert tokens.leading == (BOS,)
    for name in ("scored", "held", "refit"):
        assert (getattr(tokens, name).tokens[:, 0] == BOS).all()
    assert draw_tokens(loaded, config.model_copy(update={"bos": False}), "novels").leading == ()


def test_the_flag_brings_the_windows_without_it_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.folder(tmp_path / "model")
    LED.save_pretrained(folder)
    text = tiny.text_file(tmp_path / "text.txt", 4000)
    found = {}
    for flag in ("--bos", "--no-bos"):
        code, out, errors = command.run(capsys, "eval", folder, "--perplexity", text, "--window", "64", flag, "--json")
        assert code == 0, errors
        (found[flag],) = json.loads(out)["perplexity"].values()
    ids = token_stream([text.read_text()], LED)
    model = tiny.model()
    for flag, leading in (("--bos", (BOS,)), ("--no-bos", ())):
        expected = perplexity(model, ids, window=64, leading=leading)
        assert found[flag]["value"] == pytest.approx(expected.value, rel=1e-4)
        assert (found[flag]["leading"], found[flag]["tokens"]) == (len(leading), expected.tokens)
    assert found["--bos"]["tokens"] == len(ids)
