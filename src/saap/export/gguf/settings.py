"""From a transformers configuration to what a GGUF file says of the model, refused where llama.cpp would differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from saap.export.gguf.architectures import Architecture

Value = int | float | list[int]
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding. base: theta. local_base: of layers with a sliding window. factors: (head size / 2,) or None.

    settings: what else the file says (type, factor, original context), by the names of GGUFWriter's methods.
    """

    base: float
    local_base: float | None = None
    factors: tuple[float, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def rope_of(config: Any, head_size: int) -> Rope:
    """The rotary embedding, whichever way the configuration spells it. Raises ValueError for what cannot be said."""
    found: Any = getattr(config, "rope_parameters", None)
    if not isinstance(found, dict):  # transformers 4
        scaling = getattr(config, "rope_scaling", None) or {}
        found = {"rope_theta": config.rope_theta, **scaling}
        local = getattr(config, "rope_local_base_freq", None)
        if local is not None:
            found = {_GLOBAL: found, _LOCAL: {"rope_theta": local}}
    if not any(isinstance(value, dict) for value in found.values()):
        return _rope(found, None, head_size, config)
    local = (found.get(_LOCAL) or {}).get("rope_theta")
    return _rope(found.get(_GLOBAL) or found[_LOCAL], local, head_size, config)


def _rope(given: Mapping[str, Any], local: float | None, head_size: int, config: Any) -> Rope:
    kind = given.get("rope_type", given.get("type", "default"))
    base = float(given["rope_theta"])
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("a rotary embedding of a part of each head")
    if kind == "default":
        return Rope(base=base, local_base=local)
    if kind == "linear":
        return Rope(base=base, local_base=local, settings={"type": "linear", "factor": float(given["factor"])})
    if kind == "llama3":
        return Rope(base=base, local_base=local, factors=llama3_factors(given, base, head_size))
    if kind == "yarn":
        original = given.get("original_max_position_embeddings") or config.max_position_embeddings
        settings = {"type": "yarn", "factor": float(given["factor"]), "orig_ctx_len": int(original)}
        return Rope(base=base, local_base=local, settings=settings)
    raise ValueError(f"a rotary embedding of type {kind!r}")


def llama3_factors(given: Mapping[str, Any], base: float, head_size: int) -> tuple[float, ...]:
    """By what LLaMA 3 divides each rotary frequency: 1 for short waves, `factor` for long ones, a blend between.

    Returns (head_size / 2,). Source: the configuration of LLaMA 3.1 and its rope_type "llama3" in transformers.
    """
    factor, low, high = (float(given[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(given["original_max_position_embeddings"])
    frequencies = base ** -(np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    turns = context * frequencies / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return tuple(float(value) for value in 1.0 / ((1 - blend) / factor + blend))


def sliding_window(config: Any) -> int | None:
    """Tokens that layers with a sliding window see; None if no layer has one."""
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or getattr(config, "use_sliding_window", True) is False:
        return None
    kinds = getattr(config, "layer_types", None)
    return window if kinds is None or _LOCAL in kinds else None


def faults(config: Any, architecture: Architecture, head_size: int) -> list[str]:
    """What llama.cpp would compute otherwise than transformers, in words; empty if nothing."""
    found = []
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation != architecture.activation:
        found.append(f"the activation {activation!r} (llama.cpp has {architecture.activation!r})")
    try:
        rope_of(config, head_size)
    except ValueError as error:
        found.append(str(error))
    if architecture.window_period and sliding_window(config) is not None:
        kinds: Sequence[str] = getattr(config, "layer_types", None) or ()
        wrong = [
            index
            for index, kind in enumerate(kinds)
            if (kind == _GLOBAL) != ((index + 1) % architecture.window_period == 0)
        ]
        if wrong:
            found.append(
                f"full attention in other layers than every {architecture.window_period}th "
                f"(layers {', '.join(map(str, wrong[:6]))})"
            )
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None and architecture.norm_offset:
        wide = config.num_hidden_layers == architecture.wide_scale_layers
        expected = config.hidden_size / config.num_attention_heads if wide else head_size
        if scalar != expected:
            found.append(f"attention scaled by {scalar}^-1/2 (llama.cpp has {expected:g}^-1/2)")
    return found
