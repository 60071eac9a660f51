"""Folders for MLX-LM: what is written and rejected without it, and what it computes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.command import run
from tests.conformance.cases import CASES
from tests.export import mlx_models
from tests.export.gguf_models import adaptive_folder, family_folder
from tests.export.mlx_models import PRUNED, TOGETHER, in_mlx, next_tokens, pruned_folder, token_ids
from tests.export.test_gguf_packed import SIZES, tuned
from tests.export.test_older_transformers import uniform_folder
from tests.pipeline import tiny

import saap
from saap.core.errors import ExportError, OutputError
from saap.export import mlx
from saap.export.mlx import affine_codes, check_in_mlx, check_structure, mlx_fields
from saap.models.checkpoint.groupwise import GroupwiseWeight, pack, read_packed
from saap.models.checkpoint.pruned_structure import MLX_LOADER
from saap.pipeline.export.run import export_model, opening_lines
from saap.settings.export import ExportRequest
from saap.settings.registry import ExportFormat

REQUEST = ExportRequest(format=ExportFormat.MLX)
KEPT: dict[str, Any] = {"ffn": {1: tuple(range(32))}, "attention": {0: (1,), 2: ()}}
needs_mlx = pytest.mark.skipif(
    mlx_models.python() is None,
    reason=f"mlx-lm is not installed, and {mlx_models.PYTHON} names no Python that has it",
)
needs_mlx_here = pytest.mark.skipif(mlx_models.python() != sys.executable, reason="mlx-lm is not installed here")


def quantised(codes: torch.Tensor, bits: int, group_size: int) -> GroupwiseWeight:
    groups = codes.reshape(len(codes), -1, group_size)
    ones = torch.ones(groups.shape[:2])
    return GroupwiseWeight(pack(groups, bits), ones.half(), ones, bits, group_size)


def test_eight_nibbles_are_one_word_with_the_first_in_the_lowest_bits() -> None:
    codes = torch.arange(32).reshape(1, 32).remainder(16)
    words = affine_codes(quantised(codes, 4, 32))
    assert [f"{word:08x}" for word in words[0].tolist()] == ["76543210", "fedcba98"] * 2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_a_row_of_bits(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx, "_ROWS_AT_ONCE", 2)
    codes = torch.randint(0, 2**bits, (5, 64), generator=torch.Generator().manual_seed(bits))
    words = affine_codes(quantised(codes, bits, 32))
    assert words.dtype == torch.uint32
    assert words.shape == (5, 64 * bits // 32)
    row = np.unpackbits(words.view(torch.uint8).numpy(), axis=1, bitorder="little").reshape(5, 64, bits)
    np.testing.assert_array_equal(row @ (1 << np.arange(bits)), codes.numpy())


def test_an_adaptive_folder_has_the_loader_and_the_export_no_code_of_transformers(tmp_path: Path) -> None:
    folder = adaptive_folder(tmp_path, "llama", **KEPT)
    assert json.loads((folder / "config.json").read_text())["model_file"] == MLX_LOADER.name
    assert (folder / MLX_LOADER.name).read_bytes() == MLX_LOADER.read_bytes()
    done = export_model(folder, tmp_path / "mlx", REQUEST)
    fields = json.loads((done.path / "config.json").read_text())
    assert fields["model_file"] == MLX_LOADER.name
    assert "auto_map" not in fields
    assert not (done.path / "modeling_pruned.py").exists()
    assert (done.path / MLX_LOADER.name).is_file()
    assert (done.path / "tokenizer.json").is_file()
    card = (done.path / "README.md").read_text()
    assert "mlx_lm.generate --model PATH --trust-remote-code" in card
    assert "library_name: mlx" in card
    assert "library_name: transformers" in (folder / "README.md").read_text()
    line = 'mlx_lm.generate --model me/small --trust-remote-code --prompt "Once upon a time"'
    assert opening_lines(done.path, "me/small") == (line,)
    with safe_open(done.path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "mlx"}
    before, after = load_file(folder / "model.safetensors"), load_file(done.path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_uniform_folder_needs_no_loader(tmp_path: Path) -> None:
    done = export_model(family_folder(tmp_path / "model", "llama"), tmp_path / "mlx", REQUEST)
    assert "model_file" not in json.loads((done.path / "config.json").read_text())
    assert not (done.path / MLX_LOADER.name).exists()
    assert f'mlx_lm.generate --model {done.path} --prompt "Once upon a time"' in done.notes[-1]
    assert opening_lines(done.path, "me/small")[0].startswith("from transformers import")


def test_only_mlx_opens_a_uniform_folder_with_quantised_weights(tmp_path: Path) -> None:
    done = export_model(tuned(family_folder(tmp_path / "model", "llama", **SIZES)), tmp_path / "mlx", REQUEST)
    line = 'mlx_lm.generate --model me/small --prompt "Once upon a time"'
    assert opening_lines(done.path, "me/small") == (line,)


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_and_scales_of_recovery_are_copied(tmp_path: Path, bits: int) -> None:
    folder = tuned(adaptive_folder(tmp_path, "llama", **KEPT, **SIZES), bits=bits)
    done = export_model(folder, tmp_path / "mlx", REQUEST)
    fields = json.loads((done.path / "config.json").read_text())
    assert fields["quantization"] == fields["quantization_config"] == {"group_size": 32, "bits": bits}
    stored, packed = load_file(done.path / "model.safetensors"), read_packed(folder)
    assert done.as_dict()["packed_matrices"] == len(packed) > 0
    card = (done.path / "README.md").read_text()
    assert f"mostly in {bits} bits) |" in card
    assert f"| {done.bytes:,} |" in card
    for path, weight in packed.items():
        assert torch.equal(stored[f"{path}.weight"].view(torch.int32), affine_codes(weight).view(torch.int32))
        assert torch.equal(stored[f"{path}.scales"], weight.scale.float())
        assert torch.equal(stored[f"{path}.biases"], weight.zero)
    assert not any(tensor.dtype == torch.float16 for tensor in stored.values())  # as the folder's other weights


def test_in_half_precision_only_the_zero_points_are_rounded(tmp_path: Path) -> None:
    folder = tuned(family_folder(tmp_path / "model", "qwen2", **SIZES))
    file = folder / "model.safetensors"
    halves = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(halves, file, {"format": "pt"})
    stored = load_file(export_model(folder, tmp_path / "mlx", REQUEST).path / "model.safetensors")
    for path, weight in read_packed(folder).items():
        assert torch.equal(stored[f"{path}.scales"], weight.scale)
        assert torch.equal(stored[f"{path}.biases"], weight.zero.half())
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16, torch.uint32}


STRUCTURE = {"pruned_structure": {"sliced_arguments": {"transformer.h.0.attn": {}}}}
WEIGHT = quantised(torch.zeros(8, 64), 4, 32)


@pytest.mark.parametrize(
    ("fields", "packed", "words"),
    [
        ({}, {"a.b": quantised(torch.zeros(8, 64), 4, 16)}, r"no groups of 16 .*--group-size 32 or 64 or 128"),
        ({}, {"a.b": replace(WEIGHT, bits=4), "a.c": quantised(torch.zeros(8, 64), 8, 32)}, r"\(4, 32\), \(8, 32\)"),
        ({}, {"transposed.c": WEIGHT}, r"stored transposed \(transposed\.c\)"),
        (STRUCTURE, {}, r"one entry per head of transformer\.h\.0\.attn"),
        ({"layer_types": ["linear_attention", "full_attention"]}, {}, "layers of the kind linear_attention"),
    ],
)
def test_what_mlx_cannot_express_is_named(fields: dict[str, Any], packed: dict[str, Any], words: str) -> None:
    shapes = {"a.b.weight": (8, 64), "a.c.weight": (8, 64), "transposed.c.weight": (64, 8)}
    with pytest.raises(ExportError, match=words):
        check_structure(fields, shapes, packed)


def test_a_rejected_folder_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tuned(family_folder(tmp_path / "model", "llama", **SIZES), group_size=16)
    code, _, said = run(capsys, "export", folder, "--format", "mlx", "-o", tmp_path / "mlx")
    assert code == 2
    assert "MLX has no groups of 16 weights. Run `saap recover` with --group-size 32 or 64 or 128." in said
    assert not (tmp_path / "mlx").exists()


@pytest.mark.parametrize("inside", ["", "model"])
def test_the_model_itself_is_not_replaced(tmp_path: Path, inside: str) -> None:
    folder = family_folder(tmp_path / "outer" / inside, "llama")
    (tmp_path / "outer" / "config.json").touch()
    before = {file: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(OutputError, match="would replace the model"):
        export_model(folder, tmp_path / "outer", REQUEST, overwrite=True)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_fields_of_a_stock_folder_stay() -> None:
    assert mlx_fields({"model_type": "llama", "auto_map": {}}, {}, needs_loader=False) == {"model_type": "llama"}


def test_an_old_mlx_lm_is_named_with_the_one_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(mlx, "version", lambda name: "0.30.2")
    with pytest.raises(ExportError, match=r"mlx-lm 0\.30\.2 opens no pruned models\. Install mlx-lm 0\.31 or newer"):
        check_in_mlx({}, {})


@pytest.mark.parametrize("missing", ["all", "backend"])
def test_an_mlx_lm_without_mlx_counts_as_not_installed(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    found = mlx.importlib.util.find_spec
    there = {"mlx_lm": object(), "mlx": None if missing == "all" else object()}
    monkeypatch.setattr(mlx.importlib.util, "find_spec", lambda name: there.get(name) if name in there else found(name))
    monkeypatch.setattr(mlx, "version", lambda name: "0.31.0")
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    assert check_in_mlx({}, {}) is None


FAMILIES = ["llama", "llama_tied", "qwen2", "qwen3", "mistral", "gemma3", "mixtral", "gpt2", "phi3"]


@needs_mlx
def test_every_family_has_the_next_tokens_of_transformers(tmp_path: Path) -> None:
    cells = [(family, PRUNED["FFN channels, KV groups"]) for family in FAMILIES]
    cells += [("llama", case) for case in PRUNED.values()]
    cells += [("phi", PRUNED[what]) for what in ("an FFN", "an attention")]  # with biases
    folders = [pruned_folder(family, case, tmp_path / str(place)) for place, (family, case) in enumerate(cells)]
    ids = token_ids()
    found = in_mlx([["next tokens", str(folder), ids, TOGETHER] for folder in folders])
    for (family, case), folder, tokens in zip(cells, folders, found, strict=True):
        assert folder is not None
        assert tokens == next_tokens(folder, ids), f"{family}, {case.name}"


@needs_mlx
def test_mlx_computes_with_the_weights_of_recovery(tmp_path: Path) -> None:
    folder = tuned(adaptive_folder(tmp_path, "llama", **KEPT, **SIZES))
    out = export_model(folder, tmp_path / "mlx", REQUEST).path
    name, ids = "model.layers.0.mlp.down_proj", [token_ids()[0][:32]]
    full = tmp_path / "full.npy"
    layout, tokens = in_mlx([["dequantised", str(out), name, str(full)], ["next tokens", str(out), ids, 16]])
    assert layout == [4, 32, "mlx.core.float32"]
    expected = read_packed(folder)[name].dequantised()
    np.testing.assert_allclose(np.load(full), expected.numpy(), rtol=0, atol=1e-7)  # one product and one sum in float32
    assert tokens == next_tokens(folder, ids)


@needs_mlx
def test_the_folder_is_converted_and_quantised_by_mlx_lm(tmp_path: Path) -> None:
    adaptive = adaptive_folder(tmp_path / "adaptive", "llama", **KEPT, **SIZES)
    uniform = uniform_folder(tmp_path / "uniform", "qwen2")
    tiny.tokenizer().save_pretrained(uniform)
    stock = saap.export_mlx(family_folder(tmp_path / "stock", "qwen2", **SIZES), tmp_path / "exported")
    ids = [token_ids()[0][:32]]
    for place, folder in enumerate((adaptive, uniform, stock)):
        plain, small = str(tmp_path / f"plain-{place}"), str(tmp_path / f"small-{place}")
        jobs = [["converted", str(folder), plain, 0], ["next tokens", plain, ids, 16]]
        jobs += [["converted", str(folder), small, 32], ["next tokens", small, ids, 16]]
        _, as_it_is, _, quantised_tokens = in_mlx(jobs)
        expected = next_tokens(folder, ids)
        assert as_it_is == expected
        equal = [one == other for one, other in zip(quantised_tokens[0], expected[0], strict=True)]
        assert sum(equal) > len(equal) // 2


def lacking(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "an unknown family": (edited(base_model_type="opt"), "has no model of type 'opt'; update mlx-lm"),
    "a missing weight": (lacking, "Missing 1 parameters"),
    "another size": (edited(intermediate_size=40), "cannot become"),
}


@needs_mlx
def test_the_loader_names_what_is_wrong(tmp_path: Path) -> None:
    folder = adaptive_folder(tmp_path, "llama", **KEPT)
    jobs: list[list[Any]] = []
    for name, (break_it, _) in BROKEN.items():
        copy = shutil.copytree(folder, tmp_path / name)
        break_it(copy)
        jobs.append(["next tokens", str(copy), [[3, 4]], 1])
    dropped = next(case for case in CASES if case.name == "first block dropped")
    jobs.append(["next tokens", str(pruned_folder("gemma3", dropped, tmp_path / "gemma3")), [[3, 4]], 1])
    words = [*(word for _, word in BROKEN.values()), "gemma3_text has another attention in layer"]
    for found, word in zip(in_mlx(jobs), words, strict=True):
        assert word in found["error"]


@needs_mlx_here
def test_a_folder_that_mlx_lm_does_not_know_is_rejected_before_writing(tmp_path: Path) -> None:
    folder = adaptive_folder(tmp_path, "llama", **KEPT)
    assert "has a place for every tensor" in " ".join(export_model(folder, tmp_path / "mlx", REQUEST).notes)
    with pytest.raises(ExportError, match="has no model of type 'opt'"):
        export_model(family_folder(tmp_path / "opt", "opt"), tmp_path / "unknown", REQUEST)
    assert not (tmp_path / "unknown").exists()
