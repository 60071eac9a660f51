"""Experts removed from a GGUF file: what stays is the source's to the bit, and llama.cpp computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from tests.export.test_gguf_experts import MODELS, folder_of, model_of

from saap.core.errors import ExportError, ModelError
from saap.export.gguf.check import compare_with_llama_cpp
from saap.export.gguf.removal import open_experts
from saap.models.checkpoint.gguf_files import read_header
from saap.models.loading.llama_cpp import LlamaCpp
from saap.pipeline.export.run import export_gguf

NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts")
# Two of each of the four groups of this family stay.
CHANGES: dict[str, dict[str, Any]] = {"deepseek_v3": {"n_routed_experts": 16}}
KEPT: dict[str, tuple[int, ...]] = {"deepseek_v3": (0, 1, 5, 7, 8, 10, 14, 15)}


def file_of(at: Path, name: str, quantization: str = "f32", **changes: Any) -> Path:
    folder = folder_of(at / "model", name, **changes)
    return export_gguf(folder, at / "dense.gguf", quantization=quantization, verify=False).path


def cut_by_hand(name: str, kept: tuple[int, ...], **changes: Any) -> Any:
    """The model with these experts in every layer: what differs in shape from a smaller model is cut along axis 0."""
    dense = model_of(name, **changes)
    fields = dense.config.to_dict() | {one: len(kept) for one in NUMBERS if one in dense.config.to_dict()}
    small = transformers.AutoModelForCausalLM.from_config(type(dense.config).from_dict(fields)).float().eval()
    shapes = {key: value.shape for key, value in small.state_dict().items()}
    assert shapes != {key: value.shape for key, value in dense.state_dict().items()}
    small.load_state_dict({k: v if v.shape == shapes[k] else v[list(kept)] for k, v in dense.state_dict().items()})
    small.set_experts_implementation("eager")
    return small


@pytest.mark.parametrize("name", list(MODELS))
def test_llama_cpp_computes_the_same_as_transformers_without_them(tmp_path: Path, name: str) -> None:
    changes, kept = CHANGES.get(name, {}), KEPT.get(name, (0, 2, 3))
    experts = open_experts(file_of(tmp_path, name, **changes))
    experts.write(tmp_path / "small.gguf", dict.fromkeys(experts.layers, kept))
    ids = torch.randint(2, 300, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    with LlamaCpp(tmp_path / "small.gguf", context=64, exact=True) as opened:
        (found,) = compare_with_llama_cpp(cut_by_hand(name, kept, **changes), [opened], ids, window=64)
    assert found.share == 1.0
    assert abs(found.divergence) < 1e-6


@pytest.mark.parametrize("quantization", ["f16", "q8_0", "q4_0", "q4_1", "q4_k_m", "q6_k"])
def test_everything_that_stays_is_the_same_to_the_bit(tmp_path: Path, quantization: str) -> None:
    width = 256 if quantization.endswith(("k", "m")) else 64
    sizes = {"hidden_size": width, "intermediate_size": width, "head_dim": 32, "num_attention_heads": 2}
    source = file_of(tmp_path, "mixtral", quantization, **sizes, num_key_value_heads=1, num_local_experts=6)
    keep = {0: (0, 1, 2, 5), 1: (1, 3, 4, 5)}
    experts = open_experts(source)
    experts.write(tmp_path / "small.gguf", keep)
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(tmp_path / "small.gguf")
    assert [tensor.name for tensor in after.tensors] == [tensor.name for tensor in before.tensors]
    cut = []
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert new.tensor_type == old.tensor_type
        layer = next((layer for layer in keep if old.name.startswith(f"blk.{layer}.")), None)
        if layer is None or not ("_exps" in old.name or "gate_inp" in old.name):
            assert new.data.tobytes() == old.data.tobytes()
            continue
        cut.append(old.tensor_type.name)
        assert len(new.data) == 4
        assert new.data.tobytes() == old.data[list(keep[layer])].tobytes()
    assert len(cut) == 8
    assert set(cut) - {"F32"}
    assert experts.nbytes(keep) == sum(tensor.n_bytes for tensor in after.tensors)
    assert experts.type == quantization
    values = [{key: field.contents() for key, field in file.fields.items()} for file in (before, after)]
    changed = {key for key in values[0] if values[0][key] != values[1][key]}
    assert changed == {"llama.expert_count"}
    assert values[1]["llama.expert_count"] == 4
    text = (tmp_path / "small.gguf").read_bytes()
    assert read_header(tmp_path / "small.gguf").data_start % 32 == 0
    assert len(text) % 32 == 0


def test_removing_nothing_gives_the_same_file(tmp_path: Path) -> None:
    experts = open_experts(file_of(tmp_path, "qwen2_moe"))
    experts.write(tmp_path / "same.gguf", dict.fromkeys(experts.layers, range(4)))
    assert (tmp_path / "same.gguf").read_bytes() == experts.path.read_bytes()


def renamed(file: Path, old: bytes, new: bytes) -> Path:
    assert len(old) == len(new)
    assert old in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(old, new))
    return file


def test_files_without_such_experts_are_refused(tmp_path: Path) -> None:
    file = file_of(tmp_path, "qwen3_moe")
    whole = file.read_bytes()
    for old, new, offender in (
        (b"expert_count", b"expert_cuont", "has no experts"),
        (b"blk.0.ffn_up_exps", b"blk.0.ffn_xy_exps", r"does not know \(blk\.0\.ffn_xy_exps\.weight\)"),
        (b"blk.1.ffn_gate_inp", b"blk.1.ffn_gate.3.x", r"blk\.1\.ffn_gate\.3\.x"),
    ):
        file.write_bytes(whole)
        with pytest.raises(ExportError, match=offender):
            open_experts(renamed(file, old, new))
    file.write_bytes(whole[:-5000])
    with pytest.raises(ModelError, match="ends too early"):
        open_experts(file)
