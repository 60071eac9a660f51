"""Texts by name or file: bundled, from disk, or a public data set."""

from __future__ import annotations

import bz2
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from enum import StrEnum
from importlib import resources
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ConfigDict

from saap.core.errors import CalibrationError, SaapError

MIXED = "mixed"
CONVERSATIONS = "conversations"
# Bundled kinds with their weights in `mixed`: more of what a model knows is asked for in the last two.
KINDS: Mapping[str, int] = MappingProxyType({"novels": 1, "speeches": 1, "encyclopaedia": 3, CONVERSATIONS: 4})
FILE_ENDINGS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
# Of each kind, in the mixed evaluation text: about 8,000 tokens in all, so a prefix of it is not one kind alone.
MIXED_EVALUATION_CHARACTERS = 9_000


class Purpose(StrEnum):
    """What a text is read for; the two never share a passage."""

    CALIBRATION = "calibration"
    EVALUATION = "evaluation"


class DataSet(BaseModel):
    """Where a public data set lies and which part serves which purpose. rows: how many of the first rows, None all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    name: str | None = None
    revision: str | None = None
    column: str
    splits: dict[Purpose, str]
    rows: int | None = None


DATA_SETS = {
    "wikitext2": DataSet(
        path="Salesforce/wikitext",
        name="wikitext-2-raw-v1",
        column="text",
        splits={Purpose.CALIBRATION: "train", Purpose.EVALUATION: "test"},
    ),
    "ptb": DataSet(
        path="ptb-text-only/ptb_text_only",
        name="penn_treebank",
        revision="refs/convert/parquet",
        column="sentence",
        splits={Purpose.CALIBRATION: "train", Purpose.EVALUATION: "test"},
    ),
    "c4": DataSet(
        path="allenai/c4",
        name="en",
        column="text",
        splits={Purpose.CALIBRATION: "train", Purpose.EVALUATION: "validation"},
        rows=2000,
    ),
}


def read_documents(
    source: str | Path, *, tokenizer: Any | None = None, purpose: Purpose = Purpose.CALIBRATION
) -> tuple[str, ...]:
    """The documents that `source` names; joined by blank lines they are its text.

    source: `mixed` (all bundled kinds), one bundled kind, a public data set, or a file: .txt is one document; .jsonl
    has one document a line under `text`, or one conversation a line under `messages`, which `tokenizer` writes out with
    its chat template. Both may be gzipped.
    Raises CalibrationError if it names nothing, is empty, or a line is malformed (file and line are named).
    """
    name = str(source)
    if isinstance(source, str) and name == MIXED:
        documents = tuple(bundled_text(kind, purpose, tokenizer) for kind in KINDS)
    elif isinstance(source, str) and name in KINDS:
        documents = (bundled_text(name, purpose, tokenizer),)
    elif isinstance(source, str) and name in DATA_SETS:
        documents = _download(name, DATA_SETS[name], purpose)
    elif Path(source).is_file():
        documents = _read_file(Path(source), tokenizer)
    else:
        raise _unknown(name)
    if not any(document.strip() for document in documents):
        raise CalibrationError(f"{name} has no text", "Give a text that is not empty")
    return documents


def read_conversations(path: Path) -> tuple[list[dict[str, Any]], ...]:
    """The `messages` of each line of a .jsonl file. Raises CalibrationError, naming file and line."""
    if not path.name.endswith((".jsonl", ".jsonl.gz")) or not path.is_file():
        raise CalibrationError(f"{path} is no .jsonl file of conversations", "Give one with `messages` on each line")
    found = []
    for place, row in read_rows(path):
        messages = row.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise CalibrationError(f"{place} has no list `messages` of objects", "Give each line one")
        found.append(messages)
    if not found:
        raise CalibrationError(f"{path} has no conversations", "Give one on each line")
    return tuple(found)


def check_source(source: str) -> None:
    """Raise CalibrationError now if `source` names neither a known text nor a file; nothing is read or fetched."""
    if source not in (MIXED, *KINDS, *DATA_SETS) and not Path(source).is_file():
        raise _unknown(source)


def names_a_source(text: str) -> bool:
    """Whether a string given as calibration means a name or a file rather than being the text itself."""
    if text == MIXED or text in KINDS or text in DATA_SETS or not any(character.isspace() for character in text):
        return True
    return "\n" not in text and (text.endswith(FILE_ENDINGS) or (len(text) < 256 and Path(text).exists()))


def bundled_text(kind: str, purpose: Purpose, tokenizer: Any | None = None) -> str:
    """The bundled text of one of KINDS.

    Conversations are plain text, instruction and answer; every second one is written with the chat template of
    `tokenizer` if it has one, for a model that answers is asked in either form.
    """
    if kind == CONVERSATIONS:
        return _mixed_conversations(bundled_conversations(purpose), tokenizer)
    return _bundled(f"{kind}.{purpose}.txt.bz2")


def bundled_conversations(purpose: Purpose) -> list[list[dict[str, str]]]:
    """The `messages` of each bundled conversation, an instruction and its answer."""
    return [json.loads(row)["messages"] for row in _bundled(f"{CONVERSATIONS}.{purpose}.jsonl.bz2").splitlines()]


def _bundled(name: str) -> str:
    return bz2.decompress((resources.files("saap.data") / "bundled" / name).read_bytes()).decode()


def _mixed_conversations(conversations: list[list[dict[str, str]]], tokenizer: Any | None) -> str:
    plain = ["\n".join(message["content"] for message in messages) for messages in conversations]
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return "\n\n".join(plain)
    written = [str(tokenizer.apply_chat_template(messages, tokenize=False)) for messages in conversations[1::2]]
    return "\n\n".join(plain[::2]) + "\n\n" + "".join(written)


def evaluation_text(kind: str = MIXED) -> str:
    """A bundled text that is never calibrated on: one of KINDS, or `mixed`, the first part of each."""
    if kind == MIXED:
        parts = (bundled_text(one, Purpose.EVALUATION)[:MIXED_EVALUATION_CHARACTERS] for one in KINDS)
        return "\n\n".join(parts)
    if kind not in KINDS:
        raise _unknown(kind)
    return bundled_text(kind, Purpose.EVALUATION)


def _unknown(name: str) -> CalibrationError:
    known = (MIXED, *KINDS, *DATA_SETS)
    folder = Path(name).parent
    try:
        files = {str(folder / item.name) for item in folder.iterdir() if item.name.endswith(FILE_ENDINGS)}
    except OSError:
        files = set()
    near = get_close_matches(name, [*known, *sorted(files)], n=3, cutoff=0.6)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    problem = "is a folder" if name and Path(name).is_dir() else "is neither a file nor a known text"
    return CalibrationError(
        f"{name or repr(name)} {problem}",
        f"{hint}Give a {' or '.join(FILE_ENDINGS[:2])} file, or one of {', '.join(known)}",
    )


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl file, each with the words that say where it stands. Raises CalibrationError."""
    return _rows(path, _file_text(path))


def _read_file(path: Path, tokenizer: Any | None) -> tuple[str, ...]:
    text = _file_text(path)
    return _rows_to_documents(path, text, tokenizer) if ".jsonl" in path.suffixes else (text,)


def _file_text(path: Path) -> str:
    if not path.name.endswith(FILE_ENDINGS):
        raise CalibrationError(f"{path} is not a kind of text file that is known", f"Give {', '.join(FILE_ENDINGS)}")
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise CalibrationError(f"{path} cannot be read ({error})", "Give a readable text file") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 at byte {error.start}", "Convert it to UTF-8") from error


def _rows_to_documents(path: Path, text: str, tokenizer: Any | None) -> tuple[str, ...]:
    texts: list[str] = []
    conversations: list[str] = []
    for place, row in _rows(path, text):
        if isinstance(row.get("text"), str):
            texts.append(row["text"])
        elif isinstance(row.get("messages"), list):
            conversations.append(_written_out(place, row["messages"], tokenizer))
        else:
            raise CalibrationError(
                f"{place} has neither a string `text` nor a list `messages`", "Give each line one of the two"
            )
    # A chat template closes its turns itself; blank lines between conversations would be foreign to it.
    return (*texts, "".join(conversations)) if conversations else tuple(texts)


def _rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # Not splitlines(): JSON strings may hold line separators that are not line breaks of the file.
    for number, line in enumerate(text.split("\n"), start=1):
        place = f"{path}, line {number},"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", None) or type(error).__name__
            raise CalibrationError(f"{place} is not JSON ({reason})", "Mend or remove the line") from error
        if not isinstance(row, dict):
            raise CalibrationError(f"{place} is not a JSON object", 'Write it as {"text": "..."}')
        yield place, row


def _written_out(place: str, messages: list[Any], tokenizer: Any | None) -> str:
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"{place} has chat messages, but the model's tokenizer has no chat template",
            "Give a file with `text` rows, or a model with a chat template",
        )
    return template_text(place, messages, tokenizer, refusal=CalibrationError)


def template_text(
    place: str, messages: list[Any], tokenizer: Any, *, refusal: type[SaapError], prompt: bool = False
) -> str:
    """Messages as the tokenizer's chat template writes them. prompt: with the beginning of an answer at the end.

    Raises `refusal`, naming `place`, if they do not fit the template.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # templates are programs of the model's makers: they may raise anything
        raise refusal(
            f"{place} does not fit the chat template ({type(error).__name__}: {error})",
            "Give each message a `role` and a `content` that the template knows",
        ) from error


def _download(name: str, data_set: DataSet, purpose: Purpose) -> tuple[str, ...]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CalibrationError(
            f"{name} is read with the package `datasets`, which is not installed",
            "Run `pip install 'saap[eval]'`, or give a text file",
        ) from error
    try:
        rows = load_dataset(
            data_set.path,
            data_set.name,
            revision=data_set.revision,
            split=data_set.splits[purpose],
            streaming=data_set.rows is not None,
        )
        return tuple(str(row[data_set.column]) for row in islice(rows, data_set.rows))
    except Exception as error:  # network, cache and format errors of several libraries with no common base
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CalibrationError(
            f"the data set {name} cannot be fetched ({reason})",
            f"Connect to the network, or give a text file or one of {', '.join((MIXED, *KINDS))}",
        ) from error
