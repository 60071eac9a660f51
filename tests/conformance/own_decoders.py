"""Decoders that no one has listed: classes of their own, registered with transformers as a user would."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

HEAD_WIDTH = 6


class OwnConfig(PretrainedConfig):
    """Sizes and layout.

    kv: how keys and values lie in their fused projection. gate: how gate and value do. parallel: both parts of a block
    read the same input. centred: LayerNorm in place of the root mean square.
    """

    model_type = "unlisted_decoder"

    def __init__(
        self,
        width: int = 28,
        voices: int = 4,
        inner: int = 44,
        num_hidden_layers: int = 3,
        vocab_size: int = 96,
        kv: str = "interleaved",
        gate: str = "swapped",
        parallel: bool = True,
        centred: bool = False,
        **others: Any,
    ) -> None:
        self.width, self.voices, self.inner, self.num_hidden_layers = width, voices, inner, num_hidden_layers
        self.vocab_size, self.kv, self.gate, self.parallel, self.centred = vocab_size, kv, gate, parallel, centred
        super().__init__(**others)


class Gauge(nn.Module):
    """Root mean square; its scale is 1 + w."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.epsilon = 1e-5

    def forward(self, states: Tensor) -> Tensor:
        return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.epsilon) * (1 + self.weight)


class Ear(nn.Module):
    """Attention. Keys and values are fused: [k v] head by head, or all values before all keys."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        inner = config.voices * HEAD_WIDTH
        self.ask = nn.Linear(config.width, inner)
        self.tell = nn.Linear(config.width, 2 * inner, bias=config.kv == "interleaved")
        self.reply = nn.Linear(inner, config.width)
        self.voices, self.interleaved = config.voices, config.kv == "interleaved"

    def forward(self, states: Tensor) -> Tensor:
        batch, length, _ = states.shape
        told = self.tell(states)
        if self.interleaved:
            query = self.ask(states).view(batch, length, self.voices, HEAD_WIDTH)
            key, value = told.view(batch, length, self.voices, 2, HEAD_WIDTH).unbind(3)
        else:
            query = self.ask(states).view(batch, length, -1, HEAD_WIDTH)
            value, key = (part.reshape(query.shape) for part in told.tensor_split(2, dim=-1))
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        heard = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.reply(heard.transpose(1, 2).flatten(2))


class Sponge(nn.Module):
    """Gated feed-forward: the gate is the second half, or every second channel."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        self.soak = nn.Linear(config.width, 2 * config.inner)
        self.wring = nn.Linear(config.inner, config.width, bias=False)
        self.swapped = config.gate == "swapped"

    def forward(self, states: Tensor) -> Tensor:
        soaked = self.soak(states)
        value, gate = soaked.chunk(2, dim=-1) if self.swapped else (soaked[..., 1::2], soaked[..., ::2])
        return self.wring(value * nn.functional.silu(gate))


class Brick(nn.Module):
    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        kind = nn.LayerNorm if config.centred else Gauge
        self.before = kind(config.width)
        self.between = None if config.parallel else kind(config.width)
        self.ear, self.sponge = Ear(config), Sponge(config)

    def forward(self, states: Tensor) -> Tensor:
        ready = self.before(states)
        if self.between is None:
            return states + self.ear(ready) + self.sponge(ready)
        states = states + self.ear(ready)
        return states + self.sponge(self.between(states))


class OwnDecoder(PreTrainedModel):
    config_class = OwnConfig
    _no_split_modules = ("Brick",)

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.dictionary = nn.Embedding(config.vocab_size, config.width)
        self.places = nn.Embedding(64, config.width)
        self.wall = nn.ModuleList(Brick(config) for _ in range(config.num_hidden_layers))
        self.after = nn.LayerNorm(config.width) if config.centred else Gauge(config.width)
        self.speak = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: torch has initialised the modules."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> CausalLMOutput:
        states = self.dictionary(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        for brick in self.wall:
            states = brick(states)
        return CausalLMOutput(logits=self.speak(self.after(states)))


AutoConfig.register(OwnConfig.model_type, OwnConfig)
AutoModelForCausalLM.register(OwnConfig, OwnDecoder)

VARIANTS: dict[str, dict[str, Any]] = {
    "interleaved keys and values, swapped halves, parallel": {},
    "values before keys, gate every second channel, sequential": {
        "kv": "halves", "gate": "every second", "parallel": False,
    },
    "layer norms": {"kv": "halves", "centred": True},
}  # fmt: skip
