"""The tokens of a tokenizer.json: what each one is, which can never be removed, and what it is built from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

from saap.core.errors import ModelError, listed

Described = dict[str, Any]
"""The content of a tokenizer.json."""
KINDS = ("BPE", "Unigram", "WordPiece")
_BYTES = tuple(f"<0x{value:02X}>" for value in range(256))


@dataclass(frozen=True, slots=True)
class TokenTable:
    """The tokens of a model's rows, by id.

    contents: as the tokenizer has them, None for a row without a token. texts: as they read. fixed: ids that always
    stay: fallbacks of single bytes or characters, the unknown token, special and added tokens. needs: the ids that the
    tokenizer builds a token from, None for one that it never produces.
    """

    contents: tuple[str | None, ...]
    texts: tuple[str, ...]
    fixed: frozenset[int]
    needs: Callable[[int], tuple[int, ...] | None]

    @property
    def tokens(self) -> int:
        """How many rows have a token."""
        return sum(content is not None for content in self.contents)


def described(tokenizer: Any) -> Described:
    """The tokenizer.json of a transformers tokenizer. Raises ModelError for one that cannot be cut."""
    name = type(tokenizer).__name__
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(
            f"The tokenizer {name} has no tokenizer.json, so its vocabulary cannot be pruned",
            "Convert it to a fast tokenizer first, or leave the vocabulary out",
        )
    found: Described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = found["model"]
    if model["type"] not in KINDS:
        raise ModelError(
            f"The tokenizer {name} is of type {model['type']}, whose vocabulary cannot be pruned",
            f"Types that can: {', '.join(KINDS)}",
        )
    prefix = "continuing_subword_prefix"
    if model["type"] == "BPE" and (model.get(prefix) or model.get("end_of_word_suffix")):
        raise ModelError(
            f"The tokenizer {name} marks parts of words with a prefix or suffix, so its vocabulary cannot be pruned",
            "Leave the vocabulary out",
        )
    return found


def token_table(found: Described, rows: int) -> TokenTable:
    """The tokens of a model with `rows` rows. Raises ModelError for a tokenizer with more tokens than that.

    Added tokens without a row count for nothing: the model cannot read them.
    """
    vocabulary, added = vocabulary_of(found), {entry["content"]: entry["id"] for entry in found["added_tokens"]}
    beyond = [content for content, index in vocabulary.items() if index >= rows and content not in added]
    if beyond:
        raise ModelError(
            f"The tokenizer has {len(beyond):,} tokens without a row in the model's embedding of {rows:,} rows "
            f"({listed([repr(content) for content in beyond], 3)})",
            "Use the tokenizer that belongs to the model",
        )
    contents: list[str | None] = [None] * rows
    for content, index in (vocabulary | added).items():
        if index < rows:
            contents[index] = content
    decoder = Tokenizer.from_str(json.dumps(_without_tokens(found))).decoder
    texts = tuple(
        "" if one is None else one if one in added or decoder is None else decoder.decode([one]) for one in contents
    )
    model = found["model"]
    # The decoder does not see a character that is written in bytes, so one that it replaces stays a token.
    replaced = {index for index, one in enumerate(contents) if len(one or "") == 1 and one != texts[index]}
    unknown = model.get("unk_token") if model["type"] != "Unigram" else _unigram_unknown(model)
    fixed = {index for content, index in added.items() if index < rows} | fallbacks(found) | replaced
    fixed |= {vocabulary[unknown]} if unknown in vocabulary else set()
    if model["type"] == "Unigram":  # the penalty of unknown characters follows from the lowest score
        fixed.add(min(range(len(model["vocab"])), key=lambda index: model["vocab"][index][1]))
    needs: Callable[[int], tuple[int, ...] | None] = _nothing
    if model["type"] == "BPE":
        ranks = {merge_parts(merge): rank for rank, merge in enumerate(model["merges"])}
        needs = partial(_merged_from, contents, vocabulary, ranks, bool(model.get("ignore_merges")))
    return TokenTable(tuple(contents), texts, frozenset(fixed), needs)


def vocabulary_of(found: Described) -> dict[str, int]:
    """The id of each token of the tokenizer's model, without the added tokens that only its list has."""
    vocabulary = found["model"]["vocab"]
    if isinstance(vocabulary, list):
        return {content: index for index, (content, _) in enumerate(vocabulary)}
    return dict(vocabulary)


def fallbacks(found: Described) -> set[int]:
    """Ids of the tokens without which some text could not be written.

    All 256 bytes, where the tokenizer falls back to them; else all single characters, and the tokens that those cannot
    spell.
    """
    vocabulary, model = vocabulary_of(found), found["model"]
    present = {vocabulary[byte] for byte in _BYTES if byte in vocabulary}
    if model.get("byte_fallback") and len(present) == len(_BYTES):
        return present
    prefix = model.get("continuing_subword_prefix") or "" if model["type"] == "WordPiece" else ""

    def pieces(content: str) -> list[str]:
        inside = bool(prefix) and content.startswith(prefix) and len(content) > len(prefix)
        first, *others = list(content.removeprefix(prefix) if inside else content or " ")
        return [prefix * inside + first, *(prefix + other for other in others)]

    return present | {
        index
        for content, index in vocabulary.items()
        if len(parts := pieces(content)) == 1 or not vocabulary.keys() >= set(parts)
    }


def merge_parts(merge: str | list[str]) -> tuple[str, str]:
    """The two tokens of a merge, in either spelling of tokenizer.json."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _without_tokens(found: Described) -> Described:
    """A small tokenizer with the same decoder."""
    model = {"type": "BPE", "vocab": {}, "merges": []}
    empty = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "truncation", "padding"))
    return {**found, **empty, "added_tokens": [], "model": model}


def _unigram_unknown(model: Mapping[str, Any]) -> str | None:
    index = model.get("unk_id")
    return None if index is None else str(model["vocab"][index][0])


def _nothing(index: int) -> tuple[int, ...]:
    return ()


def _merged_from(
    contents: list[str | None], vocabulary: Mapping[str, int], ranks: Mapping[tuple[str, str], int],
    whole_words: bool, index: int,
) -> tuple[int, ...] | None:  # fmt: skip
    """Ids of all tokens on the way from single characters to a token, by the merges that BPE makes of its text.

    What lies next to the token changes nothing of that way: no merge crosses its ends, or it would not come out.
    whole_words: whether a word that is a token needs no merges.
    """
    content = contents[index]
    parts = list(content or "")
    passed: dict[str, None] = dict.fromkeys(parts)
    while len(parts) > 1:
        ways = [ranks.get(pair, len(ranks)) for pair in pairwise(parts)]
        place = min(range(len(ways)), key=ways.__getitem__)
        if ways[place] == len(ranks):
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
        passed[parts[place]] = None
    if parts != [content]:
        return () if whole_words else None
    return tuple(vocabulary[part] for part in passed if part != content)
