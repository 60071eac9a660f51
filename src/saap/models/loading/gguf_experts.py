"""Sizes of experts that a GGUF file says and transformers does not read from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saap.core.errors import ModelError

# Field of a configuration by the key in the file, for sizes that transformers leaves at their defaults.
_SIZES = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts")


def state_expert_sizes(config: Any, path: Path) -> None:
    """Set the sizes in a configuration that transformers made of the file, in place.

    Raises ModelError if the file is damaged or big-endian, or transformers reads it as a family without experts.
    """
    from saap.models.checkpoint.gguf_files import read_header

    header = read_header(path)
    if not header.own("expert_count"):
        return
    if not any(hasattr(config, name) for name in _NUMBERS):
        raise ModelError(
            f"transformers does not read the experts of GGUF files of architecture {header.architecture} ({path.name})",
            "Use the folder with safetensors that the file was made from",
        )
    for key, name in _SIZES.items():
        value = header.own(key)
        if value is not None and hasattr(config, name):
            setattr(config, name, value)
