"""Tiny random models of every family, one line each: all sizes distinct where the family allows, float64.

hidden 48, 6 heads in 3 KV groups where the family groups them (of width 12 where it can be said), FFN 80, vocabulary
128, 2 or 3 blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 128
_TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
_MHA = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 80, **_TOKENS}
_GQA = {**_MHA, "num_key_value_heads": 3}
_WIDE = {**_GQA, "head_dim": 12}
_ROTARY = {**_WIDE, "max_position_embeddings": 64}
_GEMMA = {**_ROTARY, "query_pre_attn_scalar": 12, "sliding_window": 8}
_GPT2 = {"n_embd": 48, "n_head": 6, "n_layer": 2, "n_inner": 80, "n_positions": 64, **_TOKENS}
_OPT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "ffn_dim": 80, **_TOKENS}
_OPT |= {"pad_token_id": 1, "max_position_embeddings": 64}
_NEO = {"hidden_size": 48, "num_layers": 2, "num_heads": 6, "intermediate_size": 80, **_TOKENS}
_EXPERTS = {"moe_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2}
_FUSED = {"num_local_experts": 4, "num_experts_per_tok": 2}  # as wide as the FFN
_SHARED = {**_EXPERTS, "shared_expert_intermediate_size": 64, "layer_types": ["full_attention"] * 2}
# The first block is dense, the second one takes two experts from one of two groups.
_GROUPED = {"moe_intermediate_size": 40, "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
_GROUPED |= {"n_shared_experts": 1, "n_group": 2, "topk_group": 1}
_ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1}
_ERNIE |= {"moe_intermediate_size": 40}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 24, "shared_intermediate_size": 64, "layer_types": ["attention"] * 2}
_LATENT = {"q_lora_rank": 14, "kv_lora_rank": 20, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 10}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
_HEADS = {**_MHA, **_LATENT, "num_key_value_heads": 6}
_TWO_WIDTHS = {**_ALTERNATING, "global_head_dim": 20, "hidden_size_per_layer_input": 0}
_FALCON = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "ffn_hidden_size": 80, **_TOKENS}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_ROTARY, "num_hidden_layers": 3}),
    "llama_tied": ("LlamaConfig", {**_ROTARY, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**_ROTARY, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", _GQA),
    "qwen3": ("Qwen3Config", _ROTARY),
    "gemma": ("GemmaConfig", _ROTARY),
    "gemma2": ("Gemma2Config", {**_GEMMA, "num_hidden_layers": 3}),
    "gemma3": ("Gemma3TextConfig", _GEMMA),
    "phi": ("PhiConfig", {**_GQA, "max_position_embeddings": 64}),
    "phi3": ("Phi3Config", _GQA),
    "gpt2": ("GPT2Config", _GPT2),
    "opt": ("OPTConfig", {**_OPT, "word_embed_proj_dim": 48}),
    "opt_projected": ("OPTConfig", {**_OPT, "word_embed_proj_dim": 40}),
    "bloom": ("BloomConfig", {"hidden_size": 48, "n_layer": 2, "n_head": 6, **_TOKENS}),
    "gpt_neox": ("GPTNeoXConfig", {**_MHA, "max_position_embeddings": 64}),
    "falcon": ("FalconConfig", {**_FALCON, "num_kv_heads": 3, "new_decoder_architecture": True, "alibi": False}),
    "falcon_mqa": ("FalconConfig", {**_FALCON, "multi_query": True, "parallel_attn": True, "bias": False}),
    "olmo2": ("Olmo2Config", _GQA),
    "granite": ("GraniteConfig", _GQA),
    "starcoder2": ("Starcoder2Config", _GQA),
    "smollm3": ("SmolLM3Config", _GQA),
    "stablelm": ("StableLmConfig", _GQA),
    "gptj": ("GPTJConfig", {**_GPT2, "rotary_dim": 4}),
    "glm4": ("Glm4Config", _ROTARY),
    "qwen3_next": ("Qwen3NextConfig", {**_ROTARY, "num_experts": 0, "layer_types": ["full_attention"] * 2}),
    "olmo": ("OlmoConfig", _GQA),
    "cohere": ("CohereConfig", _GQA),
    "nemotron": ("NemotronConfig", _ROTARY),
    "gpt_bigcode": ("GPTBigCodeConfig", _GPT2),
    "gpt_neo": ("GPTNeoConfig", {**_NEO, "max_position_embeddings": 64, "attention_types": [[["global", "local"], 1]]}),
    "codegen": ("CodeGenConfig", {**_GPT2, "n_head": 8, "n_ctx": 64, "rotary_dim": 4}),
    "mixtral": ("MixtralConfig", {**_ROTARY, **_FUSED}),
    "qwen2_moe": ("Qwen2MoeConfig", {**_GQA, **_EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_ROTARY, **_EXPERTS}),
    "deepseek_v3": ("DeepseekV3Config", {**_HEADS, "first_k_dense_replace": 2}),
    "gemma4": ("Gemma4TextConfig", {**_ROTARY, **_TWO_WIDTHS, "sliding_window": 8, "num_global_key_value_heads": 3}),
    "mpt": ("MptConfig", {"d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": 64, **_TOKENS}),
}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next_moe": ("Qwen3NextConfig", {**_ROTARY, **_SHARED}),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {**_ROTARY, **_SHARED}),
    "olmoe": ("OlmoeConfig", {**_GQA, "num_experts": 4, "num_experts_per_tok": 2}),
    "flex_olmo": ("FlexOlmoConfig", {**_GQA, "num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": ("GraniteMoeConfig", {**_GQA, **_FUSED}),
    "granitemoehybrid": ("GraniteMoeHybridConfig", {**_GQA, **_FUSED, **_MAMBA}),
    "phimoe": ("PhimoeConfig", {**_GQA, **_FUSED}),
    "glm4_moe": ("Glm4MoeConfig", {**_ROTARY, **_GROUPED}),
    "deepseek_v2": ("DeepseekV2Config", {**_HEADS, **_GROUPED, "topk_method": "group_limited_greedy"}),
    "deepseek_v3_moe": ("DeepseekV3Config", {**_HEADS, **_GROUPED}),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", {**_GQA, **_ERNIE}),
    "dots1": ("Dots1Config", {**_ROTARY, **_GROUPED, "layer_types": ["full_attention"] * 2}),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", {**_ROTARY, "num_experts": 4, "moe_topk": 2}),
    "gpt_oss": ("GptOssConfig", {**_ROTARY, **_FUSED, **_ALTERNATING, "sliding_window": 8}),
    "llama4_text": ("Llama4TextConfig", {**_ROTARY, **_FUSED, "intermediate_size_mlp": 64}),
    "minimax_m2": ("MiniMaxM2Config", {**_ROTARY, **_FUSED}),
}
"""Further mixtures of experts."""
EVERY = {**FAMILIES, **MIXTURES}
# In these blocks each token takes two of many FFNs; some blocks also have one that every token takes.
ALL_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next_moe", "qwen3_5_moe", "olmoe", "flex_olmo", "granitemoe")
ALL_EXPERTS += ("granitemoehybrid", "phimoe", "hunyuan_v1_moe", "gpt_oss", "llama4_text", "minimax_m2")
LAST_EXPERTS = ("deepseek_v2", "deepseek_v3_moe", "glm4_moe", "ernie4_5_moe", "dots1")
SHARED_EXPERT = (
    "hunyuan_v1_moe",
    "qwen2_moe",
    "qwen3_next_moe",
    "qwen3_5_moe",
    "granitemoehybrid",
    "llama4_text",
    *LAST_EXPERTS,
)
GROUPED = ("deepseek_v2", "deepseek_v3_moe", "glm4_moe", "dots1")  # two groups of four experts each
# Attention or routing in float32, whatever the model's dtype: some processors round sums of other lengths otherwise.
FLOAT32 = ("gptj", "llama4_text", "minimax_m2", "ernie4_5_moe", "hunyuan_v1_moe")
# Families that the conformance suite must cover.
CORE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "opt", "bloom", "gpt_neox")


def configuration(name: str) -> Any:
    """The family's tiny configuration."""
    kind, sizes = EVERY[name]
    return getattr(transformers, kind)(**sizes)


def build(name: str, *, seed: int = 0, attention: str = "eager") -> Any:
    """The family's tiny model in float64, every weight in general position (norms and biases too)."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(configuration(name), attn_implementation=attention)
    return randomised(model, seed)


def randomised(model: nn.Module, seed: int = 0) -> Any:
    """Add noise to every weight, so that nothing is zero or one; float64, evaluation mode, no gradients."""
    model.double().eval().requires_grad_(False)
    if hasattr(getattr(model, "config", None), "_experts_implementation"):
        model.set_experts_implementation("eager")  # the fused kernels know no float64
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.15)
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer.add_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64) * 0.15)
    return model


def token_ids(samples: int = 2, length: int = 7, seed: int = 1) -> Tensor:
    """Random token ids, (samples, length)."""
    return torch.randint(2, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))
