"""Configuration of a LLaMA with per-layer sizes, as read by vLLM's DeciLMForCausalLM.

`block_configs` describes attention and FFN of each layer. This file needs only transformers, and is part of the model's
folder: vllm serve FOLDER --trust-remote-code
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class Named(dict):  # type: ignore[type-arg, unused-ignore]
    """A dictionary whose entries are also attributes, so it is still plain JSON."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):  # type: ignore[misc, unused-ignore]
    """LLaMA's configuration with `block_configs`."""

    model_type = "nemotron-nas"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read config.json; the entries of `block_configs` become attributes."""
        found = super().from_dict(config_dict, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        config.block_configs = [
            Named({name: Named(part) for name, part in block.items()}) for block in config.block_configs
        ]
        return found
