"""saap prune with fewer tokens, from the command line's settings to the folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.pipeline import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import saap
from saap.core.errors import CalibrationError, ConfigurationError, ModelError, TargetError
from saap.core.vocabulary import VocabularyMap, read_vocabulary
from saap.data.texts import evaluation_text
from saap.pipeline.prune.run import preview
from saap.pipeline.shared.inputs import RunOptions
from saap.settings.prune import PruneConfig

SIZE = 285


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("dense") / "model", vocab_size=tiny.VOCABULARY + 3)


@pytest.fixture(scope="module")
def pruned(dense, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "small"
    saap.prune(dense, vocabulary_size=SIZE, languages="en,code", output_dir=out)
    return out


def test_the_stock_class_opens_the_result(dense, pruned):
    model, old = (AutoModelForCausalLM.from_pretrained(folder) for folder in (pruned, dense))
    tokenizer, before = (AutoTokenizer.from_pretrained(folder) for folder in (pruned, dense))
    assert type(model) is LlamaForCausalLM
    assert len(tokenizer) == model.config.vocab_size == SIZE
    assert json.loads((pruned / "config.json").read_text())["model_type"] == "llama"
    found = read_vocabulary(pruned)
    assert found is not None
    assert found.rows == tiny.VOCABULARY + 3
    kept = list(found.old_ids)
    assert tokenizer.convert_ids_to_tokens(list(range(SIZE))) == before.convert_ids_to_tokens(kept)
    assert torch.equal(model.model.embed_tokens.weight, old.model.embed_tokens.weight[kept])
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    text = evaluation_text()[:500]
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_its_speed_is_compared_with_the_whole_dense_model(dense, pruned):
    brief = {"prompt_tokens": 4, "new_tokens": 4, "rounds": 1}
    found = saap.evaluate(pruned, dense=dense, max_tokens=256, speed=brief).speed
    assert found.bytes_ratio > 1


def test_records_and_card_say_what_was_removed(dense, pruned):
    manifest = json.loads((pruned / "saap" / "manifest.json").read_text())
    rows = tiny.VOCABULARY + 3
    assert manifest["vocabulary"]["rows"] == {"before": rows, "after": SIZE}
    assert manifest["vocabulary"]["tokens"] == {"before": tiny.VOCABULARY, "after": SIZE}
    assert manifest["vocabulary"]["languages"] == ["en", "code"]
    assert manifest["parameters"]["before"] - manifest["parameters"]["after"] == 32 * (rows - SIZE)
    assert manifest["block_parameters"]["before"] == manifest["block_parameters"]["after"]
    assert "scores" not in manifest["digests"]
    assert not (pruned / "saap" / "scores.safetensors").exists()
    card = (pruned / "README.md").read_text()
    assert f"with {SIZE} of its {tiny.VOCABULARY} tokens" in card
    assert "speculative decoding" in card
    assert "bits per byte, dense" in card


def test_perplexities_are_per_token_of_the_dense_model(dense, pruned):
    report = saap.evaluate(pruned, dense=str(dense), texts=["bundled"], window=128, max_tokens=600)
    assert report.dense is not None
    small, whole = report.perplexity["bundled"], report.dense.perplexity["bundled"]
    assert small.text_digest != whole.text_digest  # each reads its own tokens
    assert small.bits_per_byte is not None
    assert small.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=0.3)


def test_blocks_and_tokens_together(dense, tmp_path):
    result = saap.prune(
        dense, vocabulary_ratio=0.1, pruning_ratio=0.2, languages="en", preset="fast", output_dir=tmp_path / "out"
    )  # fmt: skip
    report = result.report
    assert report.vocabulary is not None
    assert report.vocabulary.tokens.after == 288
    assert report.parameters < report.parameters_dense - 32 * (323 - 288)
    assert saap.load(tmp_path / "out").config.vocab_size == 288
    assert (tmp_path / "out" / "saap" / "vocabulary.json").is_file()
    assert saap.evaluate(tmp_path / "out", max_tokens=300, window=100).perplexity["bundled"].value > 1


def test_a_target_in_parameters_counts_both(dense):
    report = saap.prune(dense, vocabulary_size=288, target_params=50_000, languages="en", preset="fast").report
    assert report.parameters <= 50_000


def test_a_loaded_model_is_not_changed():
    model, tokenizer = tiny.model(vocab_size=323), tiny.tokenizer()
    before = model.model.embed_tokens.weight.clone()
    result = saap.prune(model, vocabulary_size=270, languages="en", tokenizer=tokenizer, calibration="novels")
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert model.config.vocab_size == 323
    assert result.model.config.vocab_size == 270


def test_what_the_users_text_uses_stays(dense, tmp_path):
    text = tmp_path / "own.txt"
    text.write_text(" the" * 3000 + " quartz")
    saap.prune(dense, vocabulary_size=285, languages="fr", calibration=text, output_dir=tmp_path / "out")
    tokenizer, before = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", dense))
    for words in (" the", " quartz"):
        assert tokenizer.tokenize(words) == before.tokenize(words)


def test_token_ids_are_renumbered(dense):
    ids = np.asarray(tiny.tokenizer()(evaluation_text()[:40000]).input_ids[:4096]).reshape(32, 128)
    few = np.where(ids < 270, ids, 5)
    report = saap.prune(dense, vocabulary_size=290, pruning_ratio=0.1, languages="en", calibration=few, preset="fast")
    assert report.plan.parameters < 60_000


def test_coverage_decides_on_the_size(dense):
    sizes = [
        saap.prune(dense, keep_coverage=coverage, languages="en").report.vocabulary.tokens.after
        for coverage in (0.9, 0.98)
    ]  # fmt: skip
    assert 257 <= sizes[0] < sizes[1] < tiny.VOCABULARY


def test_a_dry_run_says_how_many_tokens_would_stay(dense, tmp_path):
    config = PruneConfig(vocabulary_size=SIZE, languages=("en",), calibration=("novels",))
    found = preview(dense, config, RunOptions(out=tmp_path / "out"))
    assert found["vocabulary"]["tokens"] == {"before": tiny.VOCABULARY, "after": SIZE}
    assert not (tmp_path / "out").exists()


def test_what_is_refused(dense, tmp_path):
    with pytest.raises(TargetError, match=r"257 tokens have to stay.*Keep at least 257"):
        saap.prune(dense, vocabulary_size=100)
    with pytest.raises(TargetError, match="no more than the 4,000 to keep"):
        saap.prune(dense, vocabulary_size="4k", languages="en")
    with pytest.raises(ConfigurationError, match=r"'germn'.*Did you mean german"):
        saap.prune(dense, vocabulary_size=300, languages="germn")
    with pytest.raises(ConfigurationError, match="no size of the vocabulary was given"):
        saap.prune(dense, roles="vocabulary")
    with pytest.raises(ConfigurationError, match="no size of the vocabulary was given"):
        saap.prune(dense, pruning_ratio=0.2, languages="en")
    with pytest.raises(ModelError, match="The model has no tokenizer"):
        saap.prune(tiny.model(), vocabulary_size=300)
    with pytest.raises(ModelError, match="tokens without a row"):
        saap.prune(tiny.model(vocab_size=300), vocabulary_size=280, tokenizer=tiny.tokenizer(), calibration="novels")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"image": "a.png", "text": "a"}\n')
    with pytest.raises(CalibrationError, match="Image-text pairs"):
        saap.prune(dense, vocabulary_size=300, calibration=pairs)


def test_a_damaged_map_is_refused(pruned, tmp_path):
    (tmp_path / "saap").mkdir()
    file = tmp_path / "saap" / "vocabulary.json"
    file.write_text(VocabularyMap(rows=3, old_ids=(0, 2)).model_dump_json())
    assert read_vocabulary(tmp_path) == VocabularyMap(rows=3, old_ids=(0, 2))
    file.write_text('{"rows": 3, "old_ids": [2, 1]}')
    with pytest.raises(ModelError, match=r"not a map of a vocabulary"):
        read_vocabulary(tmp_path)


def test_the_dense_model_teaches_in_the_same_tokens(dense, pruned, tmp_path):
    result = saap.recover(
        pruned, data="conversations", dense=str(dense), max_steps=2, length=64, validation_samples=2,
        output_dir=tmp_path / "out",
    )  # fmt: skip
    assert result.report.perplexity > 1
    assert read_vocabulary(tmp_path / "out") == read_vocabulary(pruned)


def test_llama_cpp_reads_the_same_tokens(pruned, tmp_path):
    pytest.importorskip("llama_cpp_py_sync")
    exported = saap.export_gguf(pruned, tmp_path / "small.gguf", quantization="f32")
    assert exported.path.is_file()
