"""The cut of a tokenizer: its tokenizer.json with fewer tokens, renumbered in the old order."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from saap.core.errors import VerificationError
from saap.vocabulary.tokens import Described, described, merge_parts, vocabulary_of


def renumbered(kept: Sequence[int]) -> dict[int, int]:
    """New id of each kept old id. kept: ascending."""
    return {old: new for new, old in enumerate(kept)}


def cut_description(found: Described, kept: Sequence[int]) -> Described:
    """A tokenizer.json with only the tokens of the ids `kept`, ascending, which become 0, 1, 2 and so on.

    It gives the same tokens as before wherever those are all kept. BPE: merges of kept tokens stay, in their order, so
    each step of such a text is still the first that can be made. Unigram: the best segmentation is among the remaining
    ones. WordPiece: the longest match is still there. kept has what `token_table` says that must stay.
    """
    new = renumbered(kept)
    model = dict(found["model"])
    vocabulary = {content: index for content, index in vocabulary_of(found).items() if index in new}
    if model["type"] == "Unigram":
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in new]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {content: new[index] for content, index in sorted(vocabulary.items(), key=lambda one: one[1])}
    if model["type"] == "BPE":
        model["merges"] = [
            merge
            for merge in model["merges"]
            if (parts := merge_parts(merge))[0] in vocabulary
            and parts[1] in vocabulary
            and "".join(parts) in vocabulary
        ]
    added = [{**entry, "id": new[entry["id"]]} for entry in found["added_tokens"] if entry["id"] in new]
    changed = {**found, "model": model, "added_tokens": added}
    ids = {content: new[index] for content, index in _ids_of(found).items() if index in new}
    changed["post_processor"] = _processor(found.get("post_processor"), ids)
    if found.get("padding") is not None:
        padding = found["padding"]
        changed["padding"] = {**padding, "pad_id": ids.get(padding["pad_token"], 0)}
    return changed


def cut_tokenizer(tokenizer: Any, kept: Sequence[int]) -> Any:
    """A copy of a transformers tokenizer with only the tokens of the ids `kept`, ascending.

    Raises VerificationError if the library numbers its tokens otherwise than the rows will be.
    """
    found = described(tokenizer)
    inner = Tokenizer.from_str(json.dumps(cut_description(found, kept), ensure_ascii=False))
    new, expected = renumbered(kept), _ids_of(found)
    wrong = [
        content for content, old in expected.items() if old in new and inner.token_to_id(content) != new[old]
    ]  # fmt: skip
    if wrong or inner.get_vocab_size() != sum(old in new for old in expected.values()):
        raise VerificationError(
            f"The cut tokenizer does not number its tokens like the rows ({wrong[:3]})",
            "Report this model and command as a fault of saap",
        )
    cut = copy.copy(tokenizer)
    cut._tokenizer = inner
    for name in ("vocab_file", "merges_file"):  # of the whole vocabulary, which would be saved with it
        if hasattr(cut, name):
            setattr(cut, name, None)
    return cut


def _ids_of(found: Described) -> dict[str, int]:
    return vocabulary_of(found) | {entry["content"]: entry["id"] for entry in found["added_tokens"]}


def _processor(step: Mapping[str, Any] | None, ids: Mapping[str, int]) -> dict[str, Any] | None:
    """A post-processor with the new ids of its special tokens. ids: new id of each token."""
    if step is None:
        return None
    changed = dict(step)
    if step["type"] == "Sequence":
        changed["processors"] = [_processor(inner, ids) for inner in step["processors"]]
    elif step["type"] == "TemplateProcessing":
        changed["special_tokens"] = {
            name: {**special, "ids": [ids[token] for token in special["tokens"]]}
            for name, special in step["special_tokens"].items()
        }
    elif step["type"] in ("BertProcessing", "RobertaProcessing"):
        changed |= {name: [step[name][0], ids[step[name][0]]] for name in ("sep", "cls")}
    return changed
