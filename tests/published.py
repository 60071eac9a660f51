"""Tiny checkpoints in the quantised formats in which large models are published: FP8 in blocks, and MXFP4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP8 = torch.float8_e4m3fn
BLOCK = 16
_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_PLAIN = ("lm_head", "embed", "norm", "gate.weight", "shared_expert_gate")


def publish_fp8(folder: Path) -> Path:
    """Write the linear layers of a folder again as DeepSeek-V3 has them: float8 and a scale for each square block."""
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if weight.ndim != 2 or any(part in name for part in _PLAIN):
            tensors[name] = weight.to(torch.bfloat16)
            continue
        rows, columns = (size // BLOCK for size in weight.shape)
        blocks = weight.float().reshape(rows, BLOCK, columns, BLOCK)
        scale = blocks.abs().amax(dim=(1, 3)) / torch.finfo(FP8).max
        tensors[name] = (blocks / scale[:, None, :, None]).reshape(weight.shape).to(FP8)
        tensors[f"{name}_scale_inv"] = scale
    quantisation = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    return _written(folder, tensors, quantisation)


def publish_mxfp4(folder: Path) -> Path:
    """Write the experts of a gpt-oss folder again as published: 32 numbers of 4 bits share a power of two."""
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if weight.ndim != 3:
            tensors[name] = weight.to(torch.bfloat16)
            continue
        grouped = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))  # (experts, outputs, groups, 32)
        exponent = (grouped.abs().amax(-1) / 6).log2().ceil().clamp(-127, 127)
        scaled = grouped / exponent.exp2().unsqueeze(-1)
        code = (scaled.abs().unsqueeze(-1) - _VALUES).abs().argmin(-1) + 8 * (scaled < 0)
        tensors[f"{name}_blocks"] = (code[..., 0::2] + 16 * code[..., 1::2]).to(torch.uint8)
        tensors[f"{name}_scales"] = (exponent + 127).to(torch.uint8)
    return _written(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def _written(folder: Path, tensors: dict[str, Tensor], quantisation: dict[str, Any]) -> Path:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantisation}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
