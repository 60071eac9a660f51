"""GGUF files of models with a mixture of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from tests.export.gguf_models import family_folder, family_model, same_in_llama_cpp

import saap
from saap.core.errors import ExportError
from saap.export.gguf.plan import GgufPlan
from saap.export.gguf.write import write_gguf
from saap.models.checkpoint.safetensor_files import StoredTensors
from saap.pipeline.export.run import export_gguf
from saap.settings.export import GgufType

_SMALL = {"moe_intermediate_size": 40, "num_experts_per_tok": 2}
_ONE_GROUP = {"n_routed_experts": 4, "n_group": 1}
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.7, "beta_fast": 32.0,
    "beta_slow": 1.0, "original_max_position_embeddings": 16,
}  # fmt: skip
# llama.cpp rounds the ends of yarn's ramp, which transformers does not for this family; hence without yarn.
_SINKS = {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
_GRANITE = {
    "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.2, "logits_scaling": 2.0,
}  # fmt: skip
_GLM4 = {**_ONE_GROUP, "attention_bias": True, "use_qk_norm": True, "routed_scaling_factor": 1.5}
_LATENT = {**_ONE_GROUP, "topk_method": "greedy"}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("llama", "mixtral", {}),
    "qwen2_moe": ("qwen2moe", "qwen2_moe", {}),
    "qwen3_moe": ("qwen3moe", "qwen3_moe", {"norm_topk_prob": True}),
    "olmoe": ("olmoe", "olmoe", {"num_key_value_heads": 6}),
    "granitemoe": ("granitemoe", "granitemoe", _GRANITE),
    "hunyuan": ("hunyuan-moe", "hunyuan_v1_moe", _SMALL),
    "glm4_moe": ("glm4moe", "glm4_moe", _GLM4),
    "deepseek_v2": ("deepseek2", "deepseek_v2", {**_LATENT, "routed_scaling_factor": 1.5}),
    "deepseek_v2_yarn": ("deepseek2", "deepseek_v2", {**_LATENT, "rope_parameters": _YARN}),
    "deepseek_v3": ("deepseek2", "deepseek_v3_moe", {"n_group": 4, "topk_group": 2}),
    "gpt_oss": ("gpt-oss", "gpt_oss", _SINKS),
}
"""Architecture in llama.cpp, family of `tests.families`, and what is other than there."""


def model_of(name: str, **changes: Any) -> Any:
    _, family, own = MODELS[name]
    return family_model(family, **{**own, **changes})


def folder_of(at: Path, name: str, **changes: Any) -> Path:
    _, family, own = MODELS[name]
    return family_folder(at, family, **{**own, **changes})


@pytest.mark.parametrize("name", list(MODELS))
def test_they_compute_the_same_in_llama_cpp(tmp_path: Path, name: str) -> None:
    done = same_in_llama_cpp(folder_of(tmp_path / "model", name), tmp_path / "out.gguf")
    assert done.architecture == MODELS[name][0]


OPTIONS: dict[str, Any] = {
    "layout": "uniform", "pruning_ratio": 0.25, "num_samples": 4, "sample_length": 32, "align": 8, "preset": "fast",
    "refit_tokens": 1024,
}  # fmt: skip


@pytest.mark.parametrize("role", ["expert", "ffn"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_so_do_those_with_fewer_or_smaller_experts(tmp_path: Path, name: str, role: str) -> None:
    saap.prune(folder_of(tmp_path / "model", name), out=tmp_path / "small", roles=(role,), **OPTIONS)
    done = same_in_llama_cpp(tmp_path / "small", tmp_path / "out.gguf")
    fields = gguf.GGUFReader(done.path).fields
    found = [fields[f"{done.architecture}.{key}"].contents() for key in ("expert_count", "expert_feed_forward_length")]
    dense = [4, model_of(name).model.layers[0].mlp.experts.down_proj.shape[-1]]
    assert (found[0] < dense[0], found[1] < dense[1]) == (role == "expert", role == "ffn")


@pytest.mark.parametrize("name", ["mixtral", "granitemoe"])
def test_a_model_in_memory_has_other_names_for_the_same(tmp_path: Path, name: str) -> None:
    model, file = model_of(name), tmp_path / "out.gguf"
    tensors = StoredTensors.of_model(model)
    plan = GgufPlan(model.config, tensors.shapes, GgufType.F32)
    write_gguf(file, plan, tensors, [*plan.fields, ("tokenizer_model", "no_vocab")])
    folder = folder_of(tmp_path / "model", name)
    written = gguf.GGUFReader(export_gguf(folder, tmp_path / "other.gguf", quantization="f32", verify=False).path)
    other = {tensor.name: tensor.data for tensor in written.tensors}
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    assert found.keys() == other.keys()
    assert all((found[key] == other[key]).all() for key in found)


def test_experts_are_quantised_and_routers_are_not(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256}
    folder = folder_of(tmp_path / "model", "mixtral", **sizes)
    done = export_gguf(folder, tmp_path / "out.gguf", quantization="q6_k", imatrix=False)
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(done.path).tensors}
    assert stored["blk.0.ffn_down_exps.weight"] == "Q6_K"
    assert stored["blk.0.ffn_gate_inp.weight"] == "F32"


def refused(tmp_path: Path, folder: Path, *offenders: str) -> None:
    with pytest.raises(ExportError) as caught:
        export_gguf(folder, tmp_path / "out.gguf")
    for offender in offenders:
        assert offender in str(caught.value)
    assert not list(tmp_path.glob("*out.gguf*"))


def test_other_numbers_of_experts_by_layer_are_named(tmp_path: Path) -> None:
    options = {**OPTIONS, "layout": "adaptive"}
    saap.prune(folder_of(tmp_path / "model", "mixtral"), out=tmp_path / "small", roles=("expert",), **options)
    refused(tmp_path, tmp_path / "small", "needs the same experts in all layers, and layer", "--layout uniform")


@pytest.mark.parametrize(
    ("name", "changes", "offender"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "no place for model.layers.1.mlp.down_proj"),
        ("olmoe", {"num_key_value_heads": 3}, "3 KV heads for 6 heads"),
        ("olmoe", {"clip_qkv": 5.0}, "clipped queries"),
        ("gpt_oss", {"swiglu_limit": 3.0}, "swiglu_limit"),
        ("deepseek_v2", {"q_lora_rank": None}, "without a latent vector in 2 layers"),
        ("deepseek_v2", {"n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"}, "2 groups"),
        ("deepseek_v3", {"rope_interleave": False}, "half a head apart"),
        ("deepseek_v2_yarn", {"rope_parameters": {**_YARN, "mscale": 1.0}}, "mscale_all_dim that differ"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_named(
    tmp_path: Path, name: str, changes: dict[str, Any], offender: str
) -> None:
    refused(tmp_path, folder_of(tmp_path / "model", name, **changes), offender)
