"""Texts by name or file: bundled, from disk, or a public data set."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from importlib import resources
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from saap.core.errors import CalibrationError, SaapError, first_line

MIXED = "mixed"
CONVERSATIONS, TURNS = "conversations", ("user", "assistant")
GENERAL: Mapping[str, int] = MappingProxyType({"novels": 2, "speeches": 2, "encyclopaedia": 6, CONVERSATIONS: 8})
"""Bundled kinds of general English, with their weights in `mixed`: the last two cover more knowledge."""
KINDS: Mapping[str, int] = MappingProxyType(
    {**GENERAL, "code": 4, "mathematics": 2, "french": 3, "german": 3, "spanish": 3, "chinese": 3}
)
"""All bundled kinds, with their weights in `mixed` for a model that predicts each of them well."""
KNOWN_WELL, UNKNOWN = 1.2, 2.0
"""Bits per byte at which a kind of text has its plain weight, and from which on its weight is zero."""
LONGEST_NAME = 256
"""Characters from which on a string is the name of a file only if there is one."""
FILE_ENDINGS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
BETWEEN_PURPOSES = "\f"
"""Stands between the evaluation and the calibration text in a bundled file: together they compress better."""
# Part of each kind in the mixed evaluation text, about 8,000 tokens in all, so a prefix has several kinds.
MIXED_EVALUATION_CHARACTERS = 9_000


class Purpose(StrEnum):
    """Use of a text; the two uses never share a passage."""

    CALIBRATION = "calibration"
    EVALUATION = "evaluation"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """Location of a public data set; its split `train` is for calibration. rows: number of first rows, None for all."""

    path: str
    name: str
    revision: str | None = None
    column: str = "text"
    evaluation_split: str = "test"
    rows: int | None = None


DATA_SETS = {
    "wikitext2": DataSet(path="Salesforce/wikitext", name="wikitext-2-raw-v1"),
    "ptb": DataSet(
        path="ptb-text-only/ptb_text_only", name="penn_treebank", revision="refs/convert/parquet", column="sentence"
    ),
    "c4": DataSet(path="allenai/c4", name="en", evaluation_split="validation", rows=2000),
}


def read_documents(
    source: str | Path, *, tokenizer: Any | None = None, purpose: Purpose = Purpose.CALIBRATION
) -> tuple[str, ...]:
    """The documents of `source`; joined by blank lines they are its text.

    source: `mixed` (all bundled kinds), one bundled kind, a public data set, or a file: .txt is one document; .jsonl
    has one document a line under `text`, or one conversation a line under `messages`, which `tokenizer` writes out with
    its chat template. Both may be gzipped.
    Raises CalibrationError if it is unknown, empty, or has a malformed line (with file and line).
    """
    name = str(source)
    kinds = tuple(KINDS) if name == MIXED else (name,)
    if isinstance(source, str) and set(kinds) <= KINDS.keys():
        documents = tuple(bundled_text(kind, purpose, tokenizer) for kind in kinds)
    elif isinstance(source, str) and name in DATA_SETS:
        documents = _download(name, DATA_SETS[name], purpose)
    elif is_file(source):
        path = Path(source)
        documents = _rows_to_documents(path, tokenizer) if has_rows(path) else (_file_text(path),)
    else:
        raise _unknown(name)
    if not any(document.strip() for document in documents):
        raise CalibrationError(f"{name} has no text", "Give a text that is not empty")
    return documents


def read_conversations(path: Path) -> dict[str, list[dict[str, Any]]]:
    """By file and line, the `messages` of each line of a .jsonl file. Raises CalibrationError with file and line."""
    if not has_rows(path):
        raise CalibrationError(f"{path} is not a .jsonl file of conversations", "Give one with `messages` on each line")
    found = {}
    for place, row in read_rows(path):
        messages = row.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise CalibrationError(f"{place} has no list `messages` of objects", "Give each line one")
        found[place] = messages
    if not found:
        raise CalibrationError(f"{path} has no conversations", "Give one on each line")
    return found


def has_rows(source: str | Path) -> bool:
    """Whether a source is a file with a JSON object on each line."""
    return str(source).endswith((".jsonl", ".jsonl.gz")) and is_file(source)


def is_file(source: str | Path) -> bool:
    """Whether there is such a file; not for a text that no path can hold, where pathlib raises OSError."""
    return os.path.isfile(source)  # noqa: PTH113


def check_source(source: str) -> None:
    """Raise CalibrationError if `source` is neither a known text nor a text file; nothing is read or downloaded."""
    if source in (MIXED, *KINDS, *DATA_SETS):
        return
    if not is_file(source):
        raise _unknown(source)
    _check_ending(Path(source))


def names_a_source(text: str) -> bool:
    """Whether a calibration string is a name or a file rather than the text itself.

    A short string without white space is a name. A long one need not be: Chinese and Japanese have no spaces.
    """
    short = len(text) < LONGEST_NAME
    if short and not any(character.isspace() for character in text):
        return True
    return "\n" not in text and (text.endswith(FILE_ENDINGS) or os.path.exists(text))  # noqa: PTH110


def bundled_text(kind: str, purpose: Purpose, tokenizer: Any | None = None) -> str:
    """The bundled text of one of KINDS.

    Conversations are plain text, instruction and answer. Every second conversation uses the chat template of
    `tokenizer`, if it has one that takes them, since chat models are used in either form.
    """
    if kind != CONVERSATIONS:
        return _bundled(f"{kind}.txt.bz2", purpose)
    conversations = bundled_conversations(purpose)
    plain = ["\n".join(message["content"] for message in messages) for messages in conversations]
    try:
        written = [template_text(kind, one, tokenizer, error=CalibrationError) for one in conversations[1::2]]
    except CalibrationError:  # no template, or one that rejects an instruction and its answer
        return "\n\n".join(plain)
    return "\n\n".join(plain[::2]) + "\n\n" + "".join(written)


def bundled_conversations(purpose: Purpose) -> list[list[dict[str, str]]]:
    """The `messages` of each bundled conversation, an instruction and its answer."""
    pairs = map(json.loads, _bundled(f"{CONVERSATIONS}.jsonl.bz2", purpose).splitlines())
    return [[{"role": role, "content": text} for role, text in zip(TURNS, pair, strict=True)] for pair in pairs]


def _bundled(name: str, purpose: Purpose) -> str:
    both = bz2.decompress((resources.files("saap.data") / "bundled" / name).read_bytes()).decode()
    evaluation, _, calibration = both.partition(BETWEEN_PURPOSES)
    return evaluation if purpose is Purpose.EVALUATION else calibration


def evaluation_text() -> str:
    """Bundled evaluation text, never used for calibration: the first part of each kind in GENERAL."""
    return "\n\n".join(bundled_text(kind, Purpose.EVALUATION)[:MIXED_EVALUATION_CHARACTERS] for kind in GENERAL)


def kind_weights(bits_per_byte: Mapping[str, float]) -> dict[str, int]:
    """Weights of KINDS in `mixed` for a model, by how well it predicts each kind.

    Text that the model predicts badly does not help the reconstruction and displaces other text. What it predicts best
    is what it is for, so above the plain weight the square of the factor counts. bits_per_byte: of the model on each
    kind that it can read, comparable over tokenizers. If it predicts all kinds badly, the weights are the plain ones.
    """
    spare = {kind: max(0.0, UNKNOWN - bits_per_byte.get(kind, UNKNOWN)) for kind in KINDS}
    known = {kind: bits / (UNKNOWN - KNOWN_WELL) for kind, bits in spare.items()}
    weights = {kind: round(10 * weight * max(known[kind], known[kind] ** 2)) for kind, weight in KINDS.items()}
    return weights if any(weights.values()) else dict(KINDS)


def _unknown(name: str) -> CalibrationError:
    known = (MIXED, *KINDS, *DATA_SETS)
    files: list[str] = []
    with suppress(OSError, ValueError):
        files = sorted(str(file) for file in Path(name).parent.iterdir() if file.name.endswith(FILE_ENDINGS))
    near = get_close_matches(name, [*known, *files], n=3, cutoff=0.6)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    problem = "is a folder" if os.path.isdir(name) else "is neither a file nor a known text"  # noqa: PTH112
    shown = name if len(name) < LONGEST_NAME else f"{name[:40]}..."
    return CalibrationError(
        f"{shown or repr(name)} {problem}",
        f"{hint}Give a {' or '.join(FILE_ENDINGS[:2])} file, or one of {', '.join(known)}",
    )


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl file, each with its location in words. Raises CalibrationError."""
    # Not splitlines(): JSON strings may contain line separators that are not line breaks of the file.
    for number, line in enumerate(_file_text(path).split("\n"), start=1):
        place = f"{path}, line {number},"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or type(error).__name__
            raise CalibrationError(f"{place} is not JSON ({reason})", "Fix or remove the line") from error
        if not isinstance(row, dict):
            raise CalibrationError(f"{place} is not a JSON object", 'Write it as {"text": "..."}')
        # tokenizers fail on half of a surrogate pair
        if "\\ud" in line.lower() and re.search(r"[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
            raise CalibrationError(f"{place} has half of a surrogate pair", "Fix or remove the character")
        yield place, row


def _check_ending(path: Path) -> None:
    if not path.name.endswith(FILE_ENDINGS):
        raise CalibrationError(f"{path} is not a supported kind of text file", f"Give {', '.join(FILE_ENDINGS)}")


def _file_text(path: Path) -> str:
    _check_ending(path)
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise CalibrationError(f"{path} cannot be read ({error})", "Give a readable text file") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 at byte {error.start}", "Convert it to UTF-8") from error


def _rows_to_documents(path: Path, tokenizer: Any | None) -> tuple[str, ...]:
    texts: list[str] = []
    conversations: list[str] = []
    for place, row in read_rows(path):
        if isinstance(row.get("text"), str):
            texts.append(row["text"])
        elif isinstance(row.get("messages"), list):
            conversations.append(template_text(place, row["messages"], tokenizer, error=CalibrationError))
        else:
            raise CalibrationError(
                f"{place} has neither a string `text` nor a list `messages`", "Give each line one of the two"
            )
    # A chat template ends its turns itself; it has no blank lines between conversations.
    return (*texts, "".join(conversations)) if conversations else tuple(texts)


def template_text(
    place: str, messages: list[Any], tokenizer: Any | None, *, error: type[SaapError], prompt: bool = False
) -> str:
    """Render messages with the tokenizer's chat template. prompt: append the beginning of an answer.

    Raises `error` with `place` if there is no template, or the messages do not fit it.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise error(
            f"{place} has chat messages, but the model's tokenizer has no chat template",
            "Give rows without `messages`, or a model with a chat template",
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception as caught:  # templates are programs: they may raise anything
        raise error(
            f"{place} does not fit the chat template ({type(caught).__name__}: {caught})",
            "Give each message a `role` and a `content` that the template knows",
        ) from caught


def answer_turns(
    place: str, messages: Sequence[Any], tokenizer: Any | None, *, error: type[SaapError]
) -> Iterator[tuple[str, str]]:
    """Each assistant turn as rendered by the chat template, with the text before it.

    Raises `error` with `place` for messages that the template rejects or renders out of order.
    """
    for index, message in enumerate(messages):
        if isinstance(message, dict) and message.get("role") == "assistant":
            question, answered = list(messages[:index]), list(messages[: index + 1])
            before = template_text(place, question, tokenizer, error=error, prompt=True) if question else ""
            after = template_text(place, answered, tokenizer, error=error)
            if not after.startswith(before):
                raise error(
                    f"the answers of {place} cannot be separated, since the chat template does not continue its own "
                    "generation prompt", "Leave out the conversations for this model",
                )  # fmt: skip
            yield before, after[len(before) :]


def _download(name: str, data_set: DataSet, purpose: Purpose) -> tuple[str, ...]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(
            f"{name} is read with the package `datasets`, which is not installed",
            "Run `pip install 'saap[eval]'`, or give a text file",
        ) from error
    split = "train" if purpose is Purpose.CALIBRATION else data_set.evaluation_split
    streamed = data_set.rows is not None
    try:
        rows = load_dataset(data_set.path, data_set.name, revision=data_set.revision, split=split, streaming=streamed)
        return tuple(str(row[data_set.column]) for row in islice(rows, data_set.rows))
    except Exception as error:  # network, cache and format errors of several libraries with no common base
        raise CalibrationError(
            f"the data set {name} cannot be fetched ({first_line(error)})",
            f"Connect to the network, or give a text file or one of {', '.join((MIXED, *KINDS))}",
        ) from error
