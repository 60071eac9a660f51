"""Checkpoints as published, FP8 in blocks and MXFP4: opened dequantised, and cut without touching what stays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.export.gguf_models import family_folder
from tests.export.test_gguf_experts import folder_of
from tests.noted import Noted
from tests.published import publish_fp8, publish_mxfp4
from torch import Tensor

import saap
from saap.core.errors import ExportError, ModelError, TargetError
from saap.core.records import AxisSlice, ConfigField, CoupledGroup, ModelGraph, ModelRef, Role, Side
from saap.core.storage import GroupEntry, PlanDocument
from saap.discovery import discover
from saap.export.expert_folder import FolderExperts, open_expert_folder
from saap.models.loading.pretrained import load_model, open_skeleton
from saap.models.loading.references import resolve_model
from saap.pipeline.prune.source_file import check_plan
from saap.pipeline.recipe.run import preview_recipe
from saap.settings.recipe import recipe_from

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
MORE: dict[str, dict[str, Any]] = {
    "mixtral": {"head_dim": 16, "num_local_experts": 6},
    "qwen3_moe": {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 6},
    "deepseek_v3": {**LATENT, "moe_intermediate_size": 32, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1},
    "gpt_oss": {"head_dim": 16},
}
KEPT = (0, 2, 3)


def published(at: Path, name: str) -> Path:
    folder = folder_of(at / name, name, **{**SIZES, **MORE[name]})
    return publish_mxfp4(folder) if name == "gpt_oss" else publish_fp8(folder)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def by_hand(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values that the published formats define, float32."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
            codes = torch.stack([tensor & 15, tensor >> 4], dim=-1).flatten(-2).long()
            scales = tensors[name.replace("_blocks", "_scales")].float() - 127
            values = table[codes] * scales.exp2().unsqueeze(-1)
            found[name.removesuffix("_blocks")] = values.flatten(-2).transpose(1, 2).contiguous()
        elif f"{name}_scale_inv" in tensors:
            scale = tensors[f"{name}_scale_inv"]
            sizes = [whole // count for whole, count in zip(tensor.shape, scale.shape, strict=True)]
            found[name] = tensor.float() * scale.repeat_interleave(sizes[0], 0).repeat_interleave(sizes[1], 1)
        elif not name.endswith(("_scale_inv", "_scales")):
            found[name] = tensor.float()
    return found


@pytest.mark.parametrize("name", list(MORE))
def test_they_open_with_the_values_that_the_format_defines(tmp_path: Path, name: str) -> None:
    folder = published(tmp_path, name)
    plain = Path(shutil.copytree(folder, tmp_path / "plain"))
    save_file(by_hand(tensors_of(folder)), plain / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((plain / "config.json").read_text())
    del fields["quantization_config"]
    (plain / "config.json").write_text(json.dumps(fields))
    model = load_model(resolve_model(folder), device=torch.device("cpu"))
    expected = load_model(resolve_model(plain), device=torch.device("cpu")).state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[key]), key
    assert getattr(model.config, "quantization_config", None) is None
    assert resolve_model(folder).dtype == torch.bfloat16
    with pytest.raises(ModelError, match="quantised with"):
        open_skeleton(resolve_model(folder), torch.float32)


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_exports_have_the_buffers_and_no_quantisation_of_the_source(tmp_path: Path, name: str) -> None:
    folder = published(tmp_path, name)
    tensors = tensors_of(folder)
    bias = next((key for key in tensors if key.endswith("e_score_correction_bias")), None)
    if bias is not None:  # published in more bits than the weights
        tensors[bias] = tensors[bias].float() + torch.arange(len(tensors[bias])) / 1000
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        file = saap.export_gguf(folder, tmp_path / "out.gguf", quantization="f32", verify=False).path
        found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
        assert found["blk.1.exp_probs_b.bias"].tolist() == tensors[bias].tolist()
    written = tensors_of(saap.export_mlx(folder, tmp_path / "mlx"))
    assert "quantization_config" not in json.loads((tmp_path / "mlx" / "config.json").read_text())
    if bias is not None:
        assert torch.equal(written.pop(bias), tensors[bias])
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


OPTIONS: dict[str, Any] = {
    "pruning_ratio": 0.25, "num_samples": 4, "sample_length": 32, "align": 8, "preset": "fast", "roles": ["expert"],
}  # fmt: skip


def previewed(folder: Path, size: int) -> tuple[str | None, int | None]:
    """Type and bytes of a model of a target size in the dry run of a recipe."""
    prune = {"target_size": size, "roles": ["expert"], "layout": "uniform", "restore": False}
    recipe = recipe_from({"model": str(folder), "output_dir": str(folder / "none"), "prune": prune}, "r")
    (step,) = preview_recipe(recipe)["steps"]
    return step.get("dtype"), step.get("bytes")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_experts_that_stay_are_the_sources_to_the_bit(tmp_path: Path, name: str) -> None:
    folder, out = published(tmp_path, name), tmp_path / "small"
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoConfig": "own.Own"}}))
    (folder / "own.py").write_text("mine")
    result = saap.prune(folder, out=out, layout="uniform", restore=False, **OPTIONS)
    assert (out / "own.py").read_text() == "mine"
    old, new = tensors_of(folder), tensors_of(out)
    keep = {layer: result.plan.keep[f"layers.{layer}.expert"] for layer in (0, 1)}
    (count,) = {len(units) for units in keep.values()}
    assert 2 <= count < 6
    taken = set()
    for key, tensor in new.items():
        source, (before, _, after) = key, key.partition("experts.")[::1]
        layer = int(key.split(".")[2]) if ".layers." in key else -1
        if "experts." in key:
            number, _, rest = after.partition(".")
            source = f"{before}experts.{keep[layer][int(number)]}.{rest}"
        expected = old[source][list(keep[layer])] if key.endswith(".gate.weight") else old[source]
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor.view(torch.uint8), expected.contiguous().view(torch.uint8)), key
        taken.add(source)
    assert all(".experts." in name for name in old.keys() - taken)
    fields = [json.loads((one / "config.json").read_text()) for one in (folder, out)]
    changed = {key for key in fields[0] if fields[0][key] != fields[1][key]}
    assert changed == {"num_local_experts"} or changed == {"num_experts"}
    assert fields[0].keys() == fields[1].keys()
    assert result.report.dtype == "fp8"
    assert result.report.bytes == sum(tensor.nbytes for tensor in new.values())
    assert previewed(folder, result.report.bytes) == ("fp8", result.report.bytes)
    (folder / "model.safetensors").unlink()
    assert previewed(folder, 1) == (None, None)  # as after a download of the configuration alone
    assert (out / "README.md").is_file()
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    tokens = torch.arange(2, 42).reshape(2, 20)
    again = load_model(resolve_model(out), device=torch.device("cpu"))
    torch.testing.assert_close(again(tokens).logits, result.model(tokens).logits, rtol=0, atol=0)


def test_with_a_reconstruction_the_result_is_dequantised(tmp_path: Path) -> None:
    folder, out = published(tmp_path, "qwen3_moe"), tmp_path / "small"
    result = saap.prune(folder, out=out, layout="uniform", refit_tokens=1024, **OPTIONS)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert {tensor.dtype for tensor in tensors_of(out).values()} == {torch.bfloat16}
    assert result.report.dtype == "bfloat16"


def sink_graph() -> ModelGraph:
    """The experts of the tiny gpt-oss."""
    groups = []
    for layer in (0, 1):
        block = f"model.layers.{layer}.mlp"
        names = ("router.weight", "router.bias", "experts.gate_up_proj", "experts.down_proj_bias")
        members = tuple(
            AxisSlice(tensor=f"{block}.{name}", axis=0, side=Side.PRODUCER, offset=0, width=1, stride=1)
            for name in names
        )
        groups.append(
            CoupledGroup(layer=layer, role=Role.EXPERT, name=f"layers.{layer}.expert", units=4, members=members)
        )
    return ModelGraph(
        model=ModelRef(source="here", config_digest="c", weights_digest="w"), shapes={}, groups=tuple(groups),
        blocks=("model.layers.0", "model.layers.1"),
        config_fields=(ConfigField(role=Role.EXPERT, name="num_local_experts", per_unit=1),),
    )  # fmt: skip


def opened(folder: Path, graph: ModelGraph | None = None) -> FolderExperts:
    model = saap.load(folder)
    resolved = resolve_model(folder)
    return open_expert_folder(folder, str(resolved.quantisation), graph or discover(model), model.config)


def test_stacked_experts_are_cut_along_their_axis(tmp_path: Path) -> None:
    folder, out = published(tmp_path, "gpt_oss"), tmp_path / "small"
    out.mkdir()
    experts = opened(folder, sink_graph())
    keep = {0: KEPT, 1: (1, 2, 3)}
    experts.write(out, keep)
    old, new = tensors_of(folder), tensors_of(out)
    assert old.keys() == new.keys()
    cut = {name for name in old if ".experts." in name or ".router." in name}
    assert {name.rpartition(".")[2] for name in cut} >= {"gate_up_proj_blocks", "down_proj_scales", "down_proj_bias"}
    for name, tensor in new.items():
        layer = int(name.split(".")[2]) if name in cut else -1
        assert torch.equal(tensor, old[name][list(keep[layer])] if name in cut else old[name])
    assert experts.nbytes(keep) == sum(tensor.nbytes for tensor in new.values())
    dense, small = saap.load(folder).state_dict(), saap.load(out).state_dict()
    for name, tensor in small.items():
        expected = dense[name]
        rows = list(keep[int(name.split(".")[2])]) if tensor.shape != expected.shape else slice(None)
        assert torch.equal(tensor, expected[rows])


def test_lists_of_modules_follow(tmp_path: Path) -> None:
    folder, out = published(tmp_path, "qwen3_moe"), tmp_path / "small"
    out.mkdir()
    path = folder / "config.json"
    config = json.loads(path.read_text())
    modules = ["lm_head", "model.layers.1.mlp.experts.3.up_proj", "model.layers.1.mlp.experts.4.up_proj"]
    config["quantization_config"]["modules_to_not_convert"] = modules
    path.write_text(json.dumps(config))
    opened(folder).write(out, {0: KEPT, 1: KEPT})
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["modules_to_not_convert"] == ["lm_head", "model.layers.1.mlp.experts.2.up_proj"]


@pytest.mark.parametrize("kind", ["experts.0", "dense"])
@pytest.mark.parametrize("place", ["model.layers.2", "mtp.layers.0"])
def test_layers_for_multi_token_prediction_are_left_out_if_they_have_experts(
    tmp_path: Path, place: str, kind: str
) -> None:
    folder, out = published(tmp_path, "deepseek_v3"), tmp_path / "small"
    extra = {f"{place}.{name}": torch.ones(64, 64) for name in ("eh_proj.weight", f"mlp.{kind}.up_proj.weight")}
    save_file(tensors_of(folder) | extra, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"num_nextn_predict_layers": 1, "text_config": None}
    config["quantization_config"]["modules_to_not_convert"] = ["lm_head", f"{place}.eh_proj"]
    path.write_text(json.dumps(config))
    reporter = Noted()
    result = saap.prune(folder, out=out, layout="uniform", restore=False, reporter=reporter, **OPTIONS)
    kept = kind == "dense"
    assert any("multi-token prediction are left out" in line for line in reporter.notes) is not kept
    assert {name for name in tensors_of(out) if name.startswith(place)} == (set(extra) if kept else set())
    written = json.loads((out / "config.json").read_text())
    assert written["num_nextn_predict_layers"] == kept
    assert written["quantization_config"]["modules_to_not_convert"] == ["lm_head", *[f"{place}.eh_proj"] * kept]
    assert written["n_routed_experts"] < config["n_routed_experts"]
    tokens = torch.arange(2, 42).reshape(2, 20)
    again = load_model(resolve_model(out), device=torch.device("cpu"))
    torch.testing.assert_close(again(tokens).logits, result.model(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "shape", "offender"),
    [
        ("model.layers.0.mlp.gate.weight_scale_inv", (1, 4), "model.layers.0.mlp.gate.weight_scale_inv"),
        ("model.layers.0.mlp.experts.scales", (5, 2), "model.layers.0.mlp.experts.scales"),
        ("model.layers.0.mlp.experts.6.up_proj.weight", (32, 64), "some are missing"),
        ("draft.layers.0.mlp.experts.0.up_proj.weight", (32, 64), "experts that are not in the model"),
    ],
)
def test_other_ways_to_store_experts_are_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...], offender: str
) -> None:
    folder = published(tmp_path, "qwen3_moe")
    graph, config = discover(saap.load(folder)), saap.load(folder).config
    tensors = tensors_of(folder) | {name: torch.zeros(shape)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=offender):
        open_expert_folder(folder, "fp8", graph, config)


def test_a_plan_that_one_number_of_experts_cannot_say_is_refused(tmp_path: Path) -> None:
    experts, graph = opened(published(tmp_path, "gpt_oss"), sink_graph()), sink_graph()
    plan = PlanDocument(format_version=1, groups={"layers.0.expert": GroupEntry(kept=2, of=4)})
    with pytest.raises(ExportError, match=r"config\.json has .* but 2 to 4 are kept\. .* use --layout adaptive"):
        check_plan(experts, graph, plan)


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    folder = publish_fp8(family_folder(tmp_path / "dense", "qwen3", **SIZES, head_dim=16))
    with pytest.raises(TargetError, match="no expert groups can be pruned in this model"):
        saap.prune(folder, out=tmp_path / "small", layout="uniform", restore=False, **OPTIONS)


def test_layers_with_different_numbers_of_experts_are_refused(tmp_path: Path) -> None:
    folder = published(tmp_path, "gpt_oss")
    graph, config = sink_graph(), saap.load(folder).config
    tensors = tensors_of(folder)
    cut = {name: tensor[:3].clone() for name, tensor in tensors.items() if name.startswith("model.layers.1.mlp.")}
    save_file(tensors | cut, folder / "model.safetensors", metadata={"format": "pt"})
    groups = (graph.groups[0], replace(graph.groups[1], units=3))
    with pytest.raises(ExportError, match=r"has layers of 3, 4 experts\. Use --restore"):
        open_expert_folder(folder, "mxfp4", replace(graph, groups=groups), config)


def test_formats_that_are_not_dequantised_are_refused(tmp_path: Path) -> None:
    folder = published(tmp_path, "qwen3_moe")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "awq"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantised with awq\. Use the model as it was before"):
        resolve_model(folder)
