"""A tiny random model of every causal language model that transformers knows: what pruning it comes to.

Sizes are set by the names of a configuration's fields, in its parts too; OWN is what some classes want besides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import saap
from saap.core.errors import SaapError, first_line
from saap.core.records import Layout
from saap.discovery import discover
from saap.surgery.cut import cut

VOCABULARY, POSITIONS = 128, 1024
MOST_PARAMETERS = 10_000_000
_SIZES: tuple[tuple[int, str], ...] = (
    (48, "hidden_size d_model n_embd embedding_size emb_dim dim embed_dim word_embed_proj_dim decoder_hidden_size"),
    (48, "embedding_dim lru_width conv_dim input_embedding_size output_embedding_size"),
    (80, "intermediate_size ffn_dim n_inner encoder_ffn_dim decoder_ffn_dim d_ff d_inner dff dim_ff"),
    (80, "intermediate_size_mlp feed_forward_size ffn_hidden_size dense_intermediate_size shared_intermediate_size"),
    (80, "dense_ffn_hidden_size"),
    (40, "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size expert_ffn_size"),
    (40, "moe_shared_expert_intermediate_size shared_experts_intermediate_size"),
    (6, "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads decoder_attention_heads"),
    (6, "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads"),
    (3, "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads"),
    (4, "num_hidden_layers num_experts num_local_experts n_routed_experts moe_num_experts n_experts rotary_dim"),
    (4, "linear_num_heads linear_num_key_heads linear_num_value_heads index_n_heads"),
    (4, "mamba_n_heads n_mamba_heads mamba_num_heads"),
    (2, "num_layers n_layer n_layers encoder_layers decoder_layers depth num_decoder_layers num_encoder_layers"),
    (2, "num_experts_per_tok moe_k top_k_experts moe_top_k num_experts_per_token moe_topk num_codebooks"),
    (2, "mamba_n_groups n_groups o_groups attn_layer_period"),
    (1, "n_group topk_group num_expert_group attn_layer_offset"),
    (12, "head_dim swa_head_dim v_head_dim dim_head attention_head_dim kv_channels"),
    (8, "d_head linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim attention_head_size"),
    (8, "mamba_d_head mamba_head_dim mamba_headdim state_size mamba_d_state ssm_state_size time_step_rank"),
    (8, "q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim o_lora_rank laurel_rank gated_norm_rank"),
    (8, "sliding_window sliding_window_size window_size local_attention attention_window_size attention_chunk_size"),
    (8, "chunk_size mamba_chunk_size block_size index_block_size local_attn_chunk_length lsh_attn_chunk_length"),
    (8, "mem_len mamba_dt_rank adapter_rank index_topk hidden_size_per_layer_input router_hidden_size d_rel"),
    (8, "rel_extent loop_gate_rank hc_lowrank"),
    (16, "patch_size"),
    (POSITIONS, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions"),
    (POSITIONS, "max_sequence_length model_max_length context_length"),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size"),
    (0, "bos_token_id pad_token_id decoder_start_token_id"),
    (1, "eos_token_id"),
)  # fmt: skip
SIZES = {name: size for size, names in _SIZES for name in names.split()}

_LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_GLOBAL = {"hidden_size_global": 48}
_FULL = {"layer_types": ["full_attention"] * 4}
_HYBRID = ["linear_attention", "hybrid"] * 2
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_TWO_WIDTHS = {**_SLIDING, "global_head_dim": 16}
_ASSISTANT = {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_NGRAMS = {"ngram_vocab_size_base": 50, "make_ngram_vocab_size_divisible_by": 1, "split_ngram_parts": 1}
_NGRAMS |= {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 12, "indexer_budget": 8}
_NGRAMS |= {"indexer_compress_ratio": 2}
_DOTS_VISION = {"mlp_layer_types": ["dense", "sparse"] * 2, "num_experts_per_tok": 2, "num_local_experts": 4}
_DOTS_VISION |= {"adapter_out_dim": 48, "adapter_in_dim": 48, "head_dim": ...}
# A value of `...` leaves a field to its class.
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2, "n_group": ...},
    "bamba": {"mamba_d_head": 24, "attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 40, "encoder_config": _GLOBAL, "decoder_config": _GLOBAL},
    "codegen": {"n_head": 8},
    "cohere_compass_text": {**_SLIDING, "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}},
    "diffllama": {"num_key_value_heads": 2},
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "n_recurrent_layers": 2},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"text_config": _FULL, "vision_config": _DOTS_VISION,
                   "audio_config": {"adapter_out_dim": 48, "adapter_input_size": 48}},
    "dots3_note_text": _FULL,
    "falcon_h1": {"mamba_d_ssm": 96, "mamba_d_head": 24},
    "gemma3n_text": {**_SLIDING, "num_kv_shared_layers": 2},
    "gemma4": {"text_config": _TWO_WIDTHS},
    "gemma4_assistant": {"text_config": {**_ASSISTANT, **_SLIDING, "num_kv_shared_layers": 4}},
    "gemma4_text": _TWO_WIDTHS,
    "gemma4_unified": {"text_config": _TWO_WIDTHS,
                       "vision_config": {"mm_embed_dim": 48, "mm_posemb_size": 16, "output_proj_dims": 48}},
    "gemma4_unified_text": _TWO_WIDTHS,
    "git": {"num_hidden_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_d_head": 24, **_LINEAR},
    "helium": {"num_key_value_heads": 6, "head_dim": 8},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "moshi": {"audio_vocab_size": 32},
    "qwen4_exp": {"text_config": _NGRAMS},
    "qwen4_exp_text": _NGRAMS,
    "reformer": {"axial_pos_embds_dim": (16, 32), "axial_pos_shape": (32, 32), "hash_seed": 0},
    "roc_bert": {"shape_vocab_size": 20, "shape_embed_dim": 16,
                 "pronunciation_vocab_size": 20, "pronunciation_embed_dim": 16},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "num_blocks": 4, "num_heads": 4, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": [*_HYBRID, "linear_attention"], "num_hidden_layers": 5, "attention_head_dim": 16,
              "n_mamba_heads": 2},
    "zamba2": {"layers_block_type": _HYBRID, "num_key_value_heads": 6},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def configuration(model_type: str) -> Any:
    """A configuration of the family with small sizes. Raises what its class raises."""
    kind = CONFIG_MAPPING[model_type]
    config = kind(**_arguments(kind, OWN.get(model_type, {})))
    if getattr(config, "is_decoder", True) is False:  # an encoder's classes are causal only if they are told so
        config.is_decoder = True
    return config


def _arguments(kind: Any, own: dict[str, Any]) -> dict[str, Any]:
    mapped = getattr(kind, "attribute_map", {})
    fields = {field.name for field in dataclasses.fields(kind)} | set(mapped)
    given: dict[str, Any] = {
        name: size for name, size in SIZES.items() if name in fields and mapped.get(name) not in SIZES
    }
    if "kv_lora_rank" in fields:  # latent attention has keys for every head
        given["num_key_value_heads"] = SIZES["num_attention_heads"]
    for part, part_kind in getattr(kind, "sub_configs", {}).items():
        wanted = dict(own.get(part, {}))
        default = getattr(getattr(kind, "sub_configs_defaults", {}).get(part), "model_type", None)
        model_type = wanted.pop("model_type", default if part_kind is transformers.AutoConfig else None)
        if part_kind is not transformers.AutoConfig:
            given[part] = _arguments(part_kind, wanted)
        elif model_type is not None:
            given[part] = {**_arguments(CONFIG_MAPPING[model_type], wanted), "model_type": model_type}
    given |= {name: value for name, value in own.items() if name not in getattr(kind, "sub_configs", {})}
    return {name: value for name, value in given.items() if value is not ...}


def build(model_type: str, **changes: Any) -> Any:
    """The family's tiny model, every weight in general position. changes: of its configuration."""
    config = configuration(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.device("meta"):
        size = sum(weight.numel() for weight in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size} parameters are not tiny")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model


def attempt(model_type: str, folder: Path, layouts: Sequence[Layout] = tuple(Layout)) -> dict[str, Any]:
    """Build the family in `folder` and prune it: by layout what came of it, as JSON-able data.

    outcome: works, wrong (the result is not what it should be), refused, raised, or not built. message: why.
    """
    try:
        with _output_in(folder / "building.txt"):
            model = build(model_type)
    except Exception as error:  # the classes' own refusals
        return {"outcome": "not built", "message": _said(error)}
    try:
        with _output_in(folder / "saving.txt"):
            generates = _generates_alike(model)
            model.save_pretrained(folder / "dense")
    except Exception as error:
        return {"outcome": "raised", "message": f"the dense model is not saved: {_said(error)}"}
    return {str(layout): _pruned(folder, layout, generates) for layout in layouts}


def _pruned(folder: Path, layout: Layout, generates: bool) -> dict[str, Any]:
    printed, started = folder / f"{layout}.txt", time.monotonic()
    found: dict[str, Any] = {"outcome": "works"}
    try:
        with _output_in(printed):
            result = prune(folder / "dense", folder / str(layout), layout)
        with _output_in(folder / "checking.txt"):
            wrong = list(_differences(folder / "dense", result, generates))
        if wrong:
            found = {"outcome": "wrong", "message": "; ".join(wrong)}
    except SaapError as error:
        found = {"outcome": "refused", "message": str(error)}
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        found = {"outcome": "raised", "message": f"{_said(error)} ({Path(last.filename).name}:{last.lineno})"}
    if printed.read_text():
        found["printed"] = printed.read_text()[:2000]
    return {**found, "seconds": round(time.monotonic() - started, 1)}


def prune(source: Any, out: Path | None, layout: Layout = Layout.ADAPTIVE, **options: Any) -> saap.PruneResult:
    """The main job on little of everything."""
    calibration = torch.randint(2, VOCABULARY, (96, 64), generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"pruning_ratio": 0.2, "samples": 4, "sample_length": 16, "refit_tokens": 1024}
    settings |= {"effort": "fast", "align": 8, "device": "cpu", **options}
    return saap.prune(source, out=out, calibration=calibration, layout=layout, **settings)


def _differences(dense: Path, result: saap.PruneResult, generates: bool) -> Iterator[str]:
    assert result.path is not None
    again = saap.load(result.path, device="cpu")
    with torch.no_grad():
        if not torch.equal(again(TOKENS).logits, result.model(TOKENS).logits):
            yield "opened again it gives other logits"
    if generates and not _generates_alike(again):
        yield "with a cache it generates other tokens than without"
    cut_in_memory = saap.load(dense, device="cpu")
    graph = discover(cut_in_memory)
    cut(cut_in_memory, graph, result.plan)
    for name in other_buffers(cut_in_memory, again):
        yield f"the buffer {name} differs from that of the model in memory"


TOKENS: Tensor = torch.arange(2, 26).reshape(2, 12)


def other_buffers(first: nn.Module, second: nn.Module) -> list[str]:
    """Names of the buffers that one model lacks or that differ."""
    one, other = dict(first.named_buffers()), dict(second.named_buffers())
    return [name for name in one | other if name not in one or name not in other or not _same(one[name], other[name])]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to(other.dtype), other)


def _generates_alike(model: Any) -> bool:
    """Whether it generates the same tokens with a cache and without; False where it cannot generate."""
    settings = {"attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    try:
        with_cache, without = (model.generate(TOKENS, use_cache=use, **settings) for use in (True, False))
    except Exception:  # not all causal models generate from token ids alone
        return False
    return torch.equal(with_cache, without)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


@contextlib.contextmanager
def _output_in(file: Path) -> Iterator[None]:
    """All that the process writes to its standard output and error goes into a file for a while."""
    saved = [os.dup(1), os.dup(2)]
    with file.open("wb") as target:
        try:
            for number in (1, 2):
                os.dup2(target.fileno(), number)
            yield
        finally:
            for number, old in zip((1, 2), saved, strict=True):
                os.dup2(old, number)
                os.close(old)
