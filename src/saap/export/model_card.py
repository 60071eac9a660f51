"""Model card (README.md) of a result: description, figures, and how to open it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData, metadata_load
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from saap.core.errors import printable
from saap.core.manifest import RunManifest
from saap.core.records import Layout
from saap.models.checkpoint.modeling_pruned import MODEL_TYPE
from saap.models.checkpoint.pruned_structure import auto_class
from saap.models.loading.references import quantised_for_mlx

# Pipeline tags of the hub for models with another auto class than the usual one.
_TASKS = {"AutoModelForImageTextToText": "image-text-to-text"}
# Ways of tuning without quantised weights, after "Tuned on ... with".
_TUNINGS = {
    "lora": "plain LoRA on full-precision weights",
    "full": "all weights of the blocks trained in full precision",
    "router": "only the routers of the experts trained, in full precision",
}
CODE_OPTION = ", trust_remote_code=True"
_SPECIAL = re.compile(r"([\\`*_\[\]|~])")


def escape(text: str) -> str:
    """Text from a model's files as plain words in Markdown: one line, no markup, no HTML, at most 200 characters."""
    one_line = " ".join(printable(text).split())[:200]
    return _SPECIAL.sub(r"\\\1", one_line.replace("&", "&amp;").replace("<", "&lt;"))


def name_of(source: str) -> str:
    """Last part of a hub id, or of a path, which may be `.`."""
    return Path(source).name or Path(source).resolve().name


def licence_of(folder: Path) -> str | None:
    """The licence in the model card of `folder`, None if there is no card or it has no licence."""
    try:
        licence = (metadata_load(folder / "README.md") or {}).get("license")
    except Exception:  # missing, or cannot be parsed
        return None
    return licence if isinstance(licence, str) and re.fullmatch(r"[\w.+-]{1,60}", licence) else None


def model_card(
    manifest: RunManifest, base_model_type: str, folder: Path, *, loading: str | None = None,
    refused_by_vllm: str | None = None, library: str = "transformers", own_code: bool = False,
) -> str:  # fmt: skip
    """Model card of `folder` as Markdown with YAML front matter.

    loading: how to open the model, if not as usual. refused_by_vllm: why vLLM cannot run the folder. library: name of
    the hub for the program that opens it. own_code: whether a stock folder needs code of its own all the same.
    """
    base, opener = manifest.base, auto_class(base_model_type).__name__
    # show a whole hub id, but only the last part of a path, which is private
    named_by_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base.source) is not None and not Path(base.source).exists()
    data = ModelCardData(
        base_model=base.source if named_by_id else None,
        library_name=library,
        pipeline_tag=_TASKS.get(opener, "text-generation"),
        license=base.licence,
        tags=["saap", *(["pruned", "structured-pruning", manifest.layout.value] if manifest.is_pruned else [])],
    )
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"plain": escape, "bits": lambda value: "" if value is None else f"{value:.3f}"}
    template = (resources.files("saap.export") / "model_card.md.jinja").read_text(encoding="utf-8")
    name = name_of(base.source)
    return environment.from_string(template).render(
        manifest=manifest, front_matter=data.to_yaml(), name=name, full_name=base.source if named_by_id else name,
        base_model_type=base_model_type, auto_class=opener, loading=loading, refused_by_vllm=refused_by_vllm,
        pruned=manifest.is_pruned, option=CODE_OPTION if own_code else "",
        tokenizer_option=tokenizer_option(folder, with_code=own_code or manifest.layout is Layout.ADAPTIVE),
        data=", ".join(Path(text).name for text in manifest.recovery.data) if manifest.recovery else "",
        ways_of_tuning=_TUNINGS,
    )  # fmt: skip


def opens_with_code(config: Mapping[str, Any]) -> bool:
    """Whether a folder with this config.json is opened by code that lies in it: ours, or that of its own repository."""
    kind = config["model_type"]
    return kind == MODEL_TYPE or ("auto_map" in config and kind not in CONFIG_MAPPING)


def tokenizer_option(folder: Path, *, with_code: bool) -> str:
    """How the tokenizer of `folder` is opened: with code only if it is a class of the source's own repository.

    with_code: whether the model is opened with code. Without the option, transformers 5 then asks whether to run the
    folder's code, since it reads the model's configuration first; with False, it asks nothing and runs nothing.
    """
    file = folder / "tokenizer_config.json"
    if file.is_file() and "auto_map" in json.loads(file.read_text(encoding="utf-8")):
        return CODE_OPTION
    return ", trust_remote_code=False" if with_code else ""


def opens_only_in_mlx(config: Mapping[str, Any]) -> bool:
    """Whether a folder with this config.json was exported for MLX-LM in a form that transformers cannot open."""
    return quantised_for_mlx(config) or (config["model_type"] == MODEL_TYPE and "auto_map" not in config)


def mlx_line(path: Path | str, *, needs_loader: bool) -> str:
    """The command that runs a folder in MLX-LM. needs_loader: whether the folder has code for it."""
    option = " --trust-remote-code" if needs_loader else ""
    return f'mlx_lm.generate --model {path}{option} --prompt "Once upon a time"'


def load_lines(path: str | Path, config: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """The exact lines that open a result from `path`. config: its config.json. folder: where its tokenizer is now."""
    adaptive = config["model_type"] == MODEL_TYPE
    opener = auto_class(config["base_model_type"] if adaptive else config["model_type"]).__name__
    with_code = opens_with_code(config)
    option = CODE_OPTION if with_code else ""
    stock = (
        f"from transformers import {opener}, AutoTokenizer",
        f'model = {opener}.from_pretrained("{path}"{option})',
        f'tokenizer = AutoTokenizer.from_pretrained("{path}"{tokenizer_option(folder, with_code=with_code)})',
    )
    if not adaptive:
        return stock
    return ("import saap", f'model = saap.load("{path}")', "# or, where saap is not installed:", *stock)
