"""Export to vLLM's DeciLMForCausalLM: a LLaMA with per-layer FFN widths and numbers of KV heads.

Based on the source of vLLM 0.32 (model_executor/models/nemotron_nas.py); not run in vLLM.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from saap.core.errors import ExportError, listed
from saap.export import configuration_decilm
from saap.export.huggingface import (
    FOLDER_FILES,
    copy_matching,
    entry_bytes,
    with_both_rope_spellings,
    write_json,
    write_shards,
)
from saap.export.model_card import model_card
from saap.export.placing import check_output, whole_folder
from saap.export.source import Exported, ExportSource, Progress, layer_sizes
from saap.models.checkpoint.safetensor_files import TensorEntry
from saap.settings.export import ExportRequest

MODEL_TYPES = ("llama", "mistral")
_CODE = Path(configuration_decilm.__file__)
_NORM_OF = {"attention": "input_layernorm", "ffn": "post_attention_layernorm"}
_REMEDY = "Prune with --roles ffn, or use --layout uniform, which vLLM supports"
_LOADING = "With vLLM (class DeciLMForCausalLM; not tested by saap):\n\n```\nvllm serve PATH --trust-remote-code\n```"


def write(source: ExportSource, out: Path, request: ExportRequest, *, overwrite: bool, progress: Progress) -> Exported:
    """Write the folder atomically, one tensor at a time.

    Every layer must have all its query heads or no attention. Raises ExportError with the layers, OutputError.
    """
    if source.resolved.gguf_file is not None:
        raise ExportError(
            f"{source.resolved.source} is a GGUF file without safetensors", "Prune it first, then export the folder"
        )
    blocks, tensors = block_configs(source), source.tensors
    left_out = {
        f"model.layers.{layer}.{norm}.weight"
        for layer, block in enumerate(blocks)
        for part, norm in _NORM_OF.items()
        if block[part]["no_op"]
    }
    entries = {
        name: TensorEntry(dtype=tensors.read(name).dtype, shape=shape, make=partial(tensors.read, name))
        for name, shape in tensors.shapes.items()
        if name not in left_out
    }
    check_output(out, entry_bytes(entries), overwrite=overwrite)
    with whole_folder(out) as part:
        progress.stage(f"write {out.name}")
        write_shards(entries, part)
        copy_matching(source.resolved.folder, part, FOLDER_FILES)
        shutil.copyfile(_CODE, part / _CODE.name)
        fields = with_both_rope_spellings(json.loads(source.config.to_json_string(use_diff=False)))
        for name in ("pruned_structure", "base_model_type", "_name_or_path", "sliding_window"):
            fields.pop(name, None)
        made = configuration_decilm.DeciLMConfig
        fields |= {"model_type": made.model_type, "architectures": ["DeciLMForCausalLM"], "block_configs": blocks}
        write_json(part / "config.json", fields | {"auto_map": {"AutoConfig": f"{_CODE.stem}.{made.__name__}"}})
        if source.manifest is not None:
            card = model_card(source.manifest, source.model_type, part, loading=_LOADING)
            (part / "README.md").write_text(card, encoding="utf-8")
    return Exported(path=out, notes=(f"vllm serve {out} --trust-remote-code   # not tested",))


def block_configs(source: ExportSource) -> list[dict[str, dict[str, Any]]]:
    """Description of each layer in DeciLM's configuration.

    Raises ExportError with all unsupported layers if vLLM's class cannot express the model.
    """
    config = source.config
    if source.model_type not in MODEL_TYPES:
        raise ExportError(
            f"Models of type {source.model_type} cannot be written as DeciLM",
            f"Types that can: {', '.join(MODEL_TYPES)}",
        )
    found: list[dict[str, dict[str, Any]]] = []
    faults: list[str] = []
    for layer, (channels, heads, kv_heads) in enumerate(layer_sizes(config, source.tensors.shapes)):
        if heads and (heads != config.num_attention_heads or not kv_heads or heads % kv_heads):
            faults.append(f"layer {layer} has {heads} of {config.num_attention_heads} query heads")
        if not heads and layer == 0:
            faults.append("layer 0 has no attention")
        attention: dict[str, Any] = {"no_op": not heads, "replace_with_linear": False}
        attention["n_heads_in_group"] = heads // kv_heads if kv_heads else None
        ffn = {"no_op": not channels, "replace_with_linear": False, "intermediate_size": channels or None}
        found.append({"attention": attention, "ffn": ffn})
    changed = getattr(config, "pruned_structure", None) or {}
    faults += [f"{path} is a bias only" for path, kept in changed.get("constant", {}).items() if kept["bias"]]
    attributes = changed.get("attributes", {}).items()
    faults += [
        f"{path} has a norm epsilon of its own" for path, values in attributes if any("eps" in v for v in values)
    ]
    if getattr(config, "sliding_window", None) is not None:
        faults.append("it attends to a sliding window")
    if faults:
        raise ExportError(f"vLLM's DeciLM does not support this model: {listed(faults, 6)}", _REMEDY)
    return found
