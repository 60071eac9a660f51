"""The tokenizer's part of a GGUF file, from a Hugging Face tokenizer or from another GGUF file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf

from saap.core.errors import ExportError
from saap.export.gguf.fields import WriterFields
from saap.export.gguf.metadata import copied_fields, source_gguf
from saap.export.source import ExportSource

# LLaMA 3, Qwen 2 and similar tokenizers differ in the number of digits per piece.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Pre-tokenization of a byte-level tokenizer -> llama.cpp's name.
PRE_TOKENIZERS: Mapping[tuple[str, ...], str] = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (_WORDS.format(digits=r"\p{N}{1,3}"),): "llama-bpe",
    (_WORDS.format(digits=r"\p{N}"),): "qwen2",
}


def tokenizer_fields(source: ExportSource, rows: int) -> tuple[WriterFields, str]:
    """The tokenizer's fields, from the model's original GGUF file if that exists and has the same tokens.

    rows: of the embedding. The second result is their origin in words. Raises ExportError.
    """
    file = source_gguf(source)
    if file is not None and source.tokenizer is not None:
        fields = fields_from_gguf(file, source.tokenizer.get_vocab(), rows)
        if fields is not None:
            return fields, file.name
    made = fields_from_huggingface(source.tokenizer, rows)
    if not all(values for _, values in made if isinstance(values, list)):
        raise ExportError("The tokenizer has no merges, which llama.cpp needs", "Check its tokenizer.json")
    return made, "the model's folder"


def fields_from_gguf(path: Path, known: Mapping[str, int], rows: int) -> WriterFields | None:
    """The tokenizer fields of another GGUF file; None if it is not the model's own tokenizer.

    known: the model's tokens and ids, all of which the file must have; those beyond the embedding, which transformers
    adds when it reads some files, count for nothing. rows: of the embedding.
    """
    found = copied_fields(path, "tokenizer.")
    tokens = found[gguf.Keys.Tokenizer.LIST].value if gguf.Keys.Tokenizer.LIST in found else ()
    if len(tokens) != rows or any(index < rows and tokens[index] != text for text, index in known.items()):
        return None
    return [("key_value", key, *field) for key, field in found.items()]


def fields_from_huggingface(tokenizer: Any | None, vocabulary: int) -> WriterFields:
    """The tokenizer fields of a folder, padded with unused tokens to the rows of the embedding.

    Added tokens beyond these rows are left out, as in published Gemma 3 models for text: the model cannot read them.
    Raises ExportError if there is none, llama.cpp does not support its kind, or its own vocabulary has more tokens.
    """
    if tokenizer is None:
        raise ExportError(
            "The model has no tokenizer, which a GGUF file needs", "Put its tokenizer files into the folder"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ExportError(
            f"The tokenizer {type(tokenizer).__name__} has no tokenizer.json", "Convert it to a fast tokenizer"
        )
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise ExportError(
            f"A tokenizer of type {model['type']} cannot be written as GGUF by saap", "Use one of type BPE"
        )
    texts: dict[int, str] = {index: text for text, index in model["vocab"].items()}
    if (last := max(texts, default=-1)) >= vocabulary:
        raise ExportError(
            f"The tokenizer has {last + 1} tokens, the embedding {vocabulary} rows", "Use the model's own tokenizer"
        )
    added = {entry["id"]: entry for entry in described["added_tokens"] if entry["id"] < vocabulary}
    texts |= {index: entry["content"] for index, entry in added.items()}
    tokens = [texts.get(index, f"[PAD{index}]") for index in range(vocabulary)]
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    by_pieces = bool(model.get("byte_fallback"))
    unknown = model.get("unk_token") if by_pieces else None
    kinds = [_kind(texts.get(index), added.get(index), unknown, by_pieces) for index in range(vocabulary)]
    kind_fields = _pieces(described, tokens, merges) if by_pieces else _bytes(described, merges)
    return [*kind_fields, ("token_list", tokens), ("token_types", kinds), *_special(tokenizer, vocabulary)]


def _kind(text: str | None, added: Mapping[str, Any] | None, unknown: str | None, by_pieces: bool) -> int:
    """The type of a token. text: None for an unused token. added: its entry in the added tokens."""
    if text is None:
        return int(gguf.TokenType.UNUSED)
    if text == unknown:
        return int(gguf.TokenType.UNKNOWN)
    if added is not None:
        return int(gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED)
    is_byte = by_pieces and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return int(gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL)


def _bytes(described: Mapping[str, Any], merges: Sequence[str]) -> WriterFields:
    """Byte-level BPE: merges in order, and the pre-tokenization."""
    cuts = tuple(_cuts(described.get("pre_tokenizer")))
    name = PRE_TOKENIZERS.get(cuts)
    if name is None or described.get("normalizer") not in (None, {"type": "NFC"}):
        shown = " | ".join(cuts) if name is None else json.dumps(described["normalizer"])
        raise ExportError(
            f"saap does not know llama.cpp's name for the pre-tokenization of this tokenizer ({shown})",
            "Export the uniform layout with llama.cpp's own converter",
        )
    return [("tokenizer_model", "gpt2"), ("tokenizer_pre", name), ("token_merges", merges)]


def _cuts(step: Mapping[str, Any] | None) -> Iterator[str]:
    """The steps of a pre-tokenizer: `digits`, `words` (the pattern of GPT-2), or another pattern itself."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for inner in step["pretokenizers"]:
            yield from _cuts(inner)
    elif step["type"] == "Digits" and step["individual_digits"]:
        yield "digits"
    elif step["type"] == "ByteLevel":
        if step.get("add_prefix_space"):
            yield "a space before"
        if step.get("use_regex", True):
            yield "words"
    elif step["type"] == "Split" and "Regex" in step["pattern"]:
        yield step["pattern"]["Regex"]
    else:
        yield step["type"]


def _pieces(described: Mapping[str, Any], tokens: Sequence[str], merges: Sequence[str]) -> WriterFields:
    """BPE over pieces of text with byte fallback: llama.cpp merges the pair with the highest score first.

    So a token's score is minus the rank of its merge.
    """
    rank: dict[str, int] = {}
    for index, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), index)
    scores = [-float(rank.get(token, len(merges))) for token in tokens]
    normalizer, first = (described.get(name) or {} for name in ("normalizer", "pre_tokenizer"))
    prepends = any(step.get("type") == "Prepend" for step in (normalizer, *normalizer.get("normalizers", [])))
    prepends |= first.get("type") == "Metaspace" and first.get("prepend_scheme", "always") != "never"
    described_so = [("tokenizer_model", "llama"), ("tokenizer_pre", "default")]
    return [*described_so, ("token_scores", scores), ("add_space_prefix", prepends)]


def _special(tokenizer: Any, vocabulary: int) -> Iterator[tuple[str, Any]]:
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id", None)
        if index is not None and index < vocabulary:
            yield f"{name}_token_id", int(index)
    sample = list(tokenizer("a").input_ids)
    yield "add_bos_token", sample[:1] == [tokenizer.bos_token_id]
    yield "add_eos_token", sample[-1:] == [tokenizer.eos_token_id]
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        yield "chat_template", template
