from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.command import run
from tests.export.gguf_models import adaptive_folder, family_folder
from tests.pipeline import tiny

from saap.core.errors import EvaluationError, ModelError
from saap.evaluation.generation import prompt_ids
from saap.pipeline.evaluate.generate import Speaker, choose, continued, open_speakers
from saap.pipeline.shared import outcome
from saap.settings.evaluate import DenseSettings, GenerationSettings
from saap.settings.run import RunOptions

CPU = RunOptions(device="cpu")


def speaker() -> Speaker:
    return Speaker("answer", tiny.model(2), tiny.tokenizer())


def stream(one: Speaker, prompt: str, settings: GenerationSettings) -> list[str]:
    return list(continued(one, prompt_ids(one.tokenizer, prompt), settings))


def test_the_stream_is_what_generate_writes() -> None:
    one = speaker()
    ids = torch.tensor([prompt_ids(one.tokenizer, "Once upon")])
    made = one.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    expected = one.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    written = stream(one, "Once upon", GenerationSettings(max_tokens=6))
    assert written[-1] == expected
    assert len(written) <= 6


def test_the_answer_of_a_report_is_what_the_command_writes() -> None:
    """The model's own penalties do not apply, and the global random state stays."""
    one = speaker()
    one.model.generation_config.repetition_penalty, state = 5.0, torch.get_rng_state()
    prompt, answer = outcome.greedy_answer(one.model, one.tokenizer)
    *_, written = stream(one, prompt, GenerationSettings(max_tokens=outcome.ANSWER_TOKENS))
    assert answer == written.strip() != ""
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_follows_the_seed_and_the_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, 3.0])
    generator = torch.Generator().manual_seed(0)
    assert choose(logits, 0.0, generator) == choose(logits, 1e-300, generator) == 2
    with pytest.raises(EvaluationError, match="not finite"):
        choose(torch.tensor([0.0, float("nan")]), 1.0, generator)
    drawn = [choose(logits, 2.0, generator) for _ in range(3000)]
    share = torch.softmax(logits / 2, -1)
    for token in range(3):
        assert drawn.count(token) / 3000 == pytest.approx(float(share[token]), abs=0.04)
    one = speaker()
    settings = GenerationSettings(max_tokens=8, temperature=5.0, seed=3)
    assert stream(one, "Once", settings) == stream(one, "Once", settings)


def test_the_dense_model_is_the_one_of_the_manifest(tmp_path: Path) -> None:
    folder = adaptive_folder(tmp_path, "llama", ffn={0: (1, 2)}, attention={})
    with pytest.raises(ModelError, match=r"dense model.*--dense MODEL"):  # its manifest names a model that is not here
        open_speakers(str(folder), DenseSettings(), CPU)
    assert [one.label for one in open_speakers(str(folder), DenseSettings(no_dense=True), CPU)] == ["answer"]
    dense = family_folder(tmp_path / "whole", "llama")
    record = folder / "saap" / "manifest.json"
    fields = json.loads(record.read_text())
    fields["base"]["source"] = str(dense)
    record.write_text(json.dumps(fields))
    first, second = open_speakers(str(folder), DenseSettings(), CPU)
    assert (first.label, second.label) == ("dense", "pruned")
    assert first.model.num_parameters() > second.model.num_parameters()
    assert [one.label for one in open_speakers(str(dense), DenseSettings(), CPU)] == ["answer"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny.folder(tmp_path / "model")
    asked = ("generate", source, "--prompt", "Once", "--max-new-tokens", "4", "--device", "cpu")
    code, text, _ = run(capsys, *asked)
    assert (code, text.startswith("answer: ")) == (0, True)
    _, text, _ = run(capsys, *asked, "--dense", source, "--json")
    shown = json.loads(text)
    assert shown["dense"] == shown["pruned"] != ""
