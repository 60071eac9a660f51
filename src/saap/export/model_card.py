"""README.md of a result: what it is, what it scores, how to open it."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import ModelCardData, metadata_load

from saap.core.manifest import Change, RunManifest
from saap.core.records import Layout
from saap.models.checkpoint.differences import auto_class_name

# What the hub calls the task of models that another auto class than the usual one opens.
_TASKS = {"AutoModelForImageTextToText": "image-text-to-text"}
_SPECIAL = re.compile(r"([\\`*_\[\]|~])")


def escape(text: str) -> str:
    """Text from a model's files as plain words in Markdown: one line, no markup, no HTML, at most 200 characters."""
    one_line = " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]
    return _SPECIAL.sub(r"\\\1", one_line.replace("&", "&amp;").replace("<", "&lt;"))


def licence_of(folder: Path) -> str | None:
    """The licence that the model card in `folder` states, None if there is no card or no statement."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        data = metadata_load(card)
    except Exception:  # a card that cannot be parsed states nothing
        return None
    licence = (data or {}).get("license")
    return licence if isinstance(licence, str) and re.fullmatch(r"[\w.+-]{1,60}", licence) else None


def model_card(manifest: RunManifest, base_model_type: str, *, loading: str | None = None) -> str:
    """The card of a pruned model as Markdown with YAML front matter. loading: how to open it, if not as usual."""
    base = manifest.base
    data = ModelCardData(
        base_model=base.source if _is_repository(base.source) else None,
        library_name="transformers",
        pipeline_tag=_TASKS.get(auto_class_name(base_model_type), "text-generation"),
        license=base.licence,
        tags=["saap", *(["pruned", "structured-pruning", manifest.layout.value] if _is_pruned(manifest) else [])],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {escape(Path(base.source).name)}, {_what_was_done(manifest)}",
        _summary(manifest, base_model_type),
        "## Figures",
        _figures(manifest),
        *_recovery(manifest),
        "## Loading",
        _loading(manifest.layout, auto_class_name(base_model_type)) if loading is None else loading,
        "## How it was made",
        _making(manifest),
    ]
    return "\n\n".join(parts) + "\n"


def _is_repository(source: str) -> bool:
    """Whether the model was named by a hub id; the path of a folder is nobody else's business."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None and not Path(source).exists()


def _is_pruned(manifest: RunManifest) -> bool:
    return manifest.parameters.after < manifest.parameters.before or manifest.recovery is None


def _what_was_done(manifest: RunManifest) -> str:
    done = ["structurally pruned"] if _is_pruned(manifest) else []
    return " and ".join([*done, *(["tuned"] if manifest.recovery is not None else [])])


def _recovery(manifest: RunManifest) -> list[str]:
    record = manifest.recovery
    if record is None:
        return []
    bits, size = (escape(str(record.settings.get(name, "unknown"))) for name in ("bits", "group_size"))
    how = (
        "plain LoRA on full-precision weights"
        if record.packed_bytes is None
        else f"adapters on weights of {bits} bits in groups of {size}, merged into their "
        "zero points; the integers, scales and zero points are in `saap/packed.safetensors`"
    )
    texts = escape(", ".join(Path(name).name for name in record.data))
    rows = ["| state | perplexity |", "|---|---:|"]
    rows += [f"| {escape(name)} | {value:.2f} |" for name, value in record.perplexity.items()]
    return [
        "## Recovery",
        f"Tuned on {record.tokens:,} tokens of {texts} with {how}. "
        f"Perplexities on {record.evaluation_tokens:,} tokens of {escape(record.evaluation)}:",
        "\n".join(rows),
    ]


def _summary(manifest: RunManifest, base_model_type: str) -> str:
    layout = (
        "Each layer has its own sizes."
        if manifest.layout is Layout.ADAPTIVE
        else "All layers have the same sizes, so that it is a plain model of its architecture."
    )
    source = manifest.base.source
    name = source if _is_repository(source) else Path(source).name
    if not _is_pruned(manifest):
        return f"{escape(name)} (architecture {escape(base_model_type)}), tuned with saap."
    return (
        f"{escape(name)} (architecture {escape(base_model_type)}) without "
        f"{manifest.block_parameters.removed:.1%} of the parameters of its decoder blocks, removed as whole channels, "
        f"heads or blocks with structured adaptive pruning (saap). {layout}"
    )


def _figures(manifest: RunManifest) -> str:
    rows = ["| | dense | pruned | removed |", "|---|---:|---:|---:|"]
    counts: tuple[tuple[str, Change], ...] = (
        ("parameters", manifest.parameters),
        ("parameters of the blocks", manifest.block_parameters),
        (f"bytes of the weights ({escape(manifest.dtype)})", manifest.bytes),
    )
    rows += [f"| {name} | {c.before:,} | {c.after:,} | {c.removed:.1%} |" for name, c in counts]
    if manifest.perplexity is not None:
        p = manifest.perplexity
        rows.append(f"| perplexity, {p.tokens:,} tokens of {escape(p.text)} | {p.before:.2f} | {p.after:.2f} | |")
    if manifest.speed is not None:
        s = manifest.speed
        rows.append(
            f"| tokens/s, decoding in {escape(s.runtime)}, {escape(s.weights)} | {s.dense_tokens_per_second:.1f} | "
            f"{s.tokens_per_second:.1f} | {s.reached:.2f} x |"
        )
    return "\n".join(rows)


def _loading(layout: Layout, auto_class: str) -> str:
    plain = (
        "```python\nfrom transformers import AUTO_CLASS, AutoTokenizer\n\n"
        'model = AUTO_CLASS.from_pretrained("PATH"{option})\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH"{option})\n```'
    ).replace("AUTO_CLASS", auto_class)
    if layout is Layout.UNIFORM:
        return "With transformers, or with any program that reads this architecture:\n\n" + plain.format(option="")
    return (
        "With saap installed, no code of this folder is run:\n\n"
        '```python\nimport saap\n\nmodel = saap.load("PATH")\n```\n\n'
        f"`import saap.auto` makes `{auto_class}.from_pretrained` open it as well.\n\n"
        "Without saap, through the short file `modeling_pruned.py` of this folder, which you may read first:\n\n"
        + plain.format(option=", trust_remote_code=True")
    )


def _making(manifest: RunManifest) -> str:
    versions = ", ".join(escape(f"{name} {version}") for name, version in manifest.versions.items())
    return (
        f"Seed {manifest.seed}; {versions}. `saap/manifest.json` has all settings, digests, times and peak memory, "
        "`saap/plan.json` the kept units of every layer, `saap/scores.safetensors` the scores they were chosen by."
    )
