"""Training examples: plain text in blocks, and conversations, whose answers are learned."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from saap.core.errors import TrainingDataError
from saap.core.records import IntArray, digest_of
from saap.data.samples import leading_ids, token_stream
from saap.data.texts import KINDS, MIXED, answer_turns, has_rows, read_documents, read_rows

LEAST_BLOCK = 16
HELD_SHARE = 10
"""At most one example in this many is held out for validation."""
# Stanford Alpaca's prompt format, for tokenizers without a chat template.
_INSTRUCTION, _INPUT, _RESPONSE = "### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:\n"


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A sequence with a loss mask.

    tokens: (n,) ids. learned: (n,) bool, True where the prediction of the token has a loss; never for the first token.
    prompt: tokens before the first answer of a conversation; 0 for plain text.
    """

    tokens: IntArray
    learned: np.ndarray[Any, np.dtype[np.bool_]]
    prompt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """train: training examples. held_out: validation examples. sources: their names. seed: of split and order."""

    sources: tuple[str, ...]
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    seed: int

    @property
    def digest(self) -> str:
        """sha256 over all tokens, their loss masks, and the seed."""
        parts = [digest_of([one.tokens, one.learned.astype(np.int64)]) for one in (*self.train, *self.held_out)]
        return digest_of([parts, len(self.held_out), self.seed])

    def step_indices(self, step: int, batch: int) -> list[int]:
        """Indices into `train` of the examples of one step; a function of seed and step alone, so nothing is stored.

        Every epoch has its own random order; a batch may span the end of one epoch and the beginning of the next.
        """
        count = len(self.train)
        places = range(step * batch, (step + 1) * batch)
        return [int(_order(self.seed, place // count, count)[place % count]) for place in places]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> IntArray:
    """The order of the examples in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def training_data(
    sources: Sequence[str | Path], tokenizer: Any | None, *, length: int, held_out: int, seed: int, bos: bool = True,
    kinds: Collection[str] = KINDS,
) -> TrainingData:  # fmt: skip
    """Read all sources, and hold out some examples for validation.

    sources: as `read_documents` takes them (plain text is cut into blocks of `length` tokens that do not overlap), or a
    .jsonl file with `instruction`, `input`, `output` or with chat `messages` on each line, of which the answers are
    learned. length: longer conversations are cut. held_out: examples for validation, at most a tenth, at least
    one. bos: whether sequences begin with the tokenizer's leading ids. kinds: of text that `mixed` stands for.
    Raises TrainingDataError, CalibrationError.
    """
    if not sources:
        raise TrainingDataError("No training data is given", f"Specify a file with --data, or `{MIXED}`")
    leading = leading_ids(tokenizer, bos=bos)
    # the bundled kinds one by one, so that no block spans two of them, and each once
    parts = dict.fromkeys(part for source in sources for part in (kinds if source == MIXED else (source,)))
    examples = [one for part in parts for one in _examples(part, tokenizer, length, leading)]
    if len(examples) < 2:
        raise TrainingDataError(
            f"{', '.join(map(str, sources))} provides {len(examples)} examples of {length} tokens",
            "Give more data, or a smaller --max-seq-length",
        )
    order = np.random.default_rng([seed, len(examples)]).permutation(len(examples))
    held_back = max(1, min(held_out, len(examples) // HELD_SHARE))
    return TrainingData(
        sources=tuple(str(source) for source in sources),
        train=tuple(examples[index] for index in order[held_back:]),
        held_out=tuple(examples[index] for index in order[:held_back]),
        seed=seed,
    )


def _examples(source: str | Path, tokenizer: Any | None, length: int, leading: Sequence[int]) -> list[Example]:
    if has_rows(source):
        first = next(read_rows(Path(source)), None)
        if first is not None and not isinstance(first[1].get("text"), str):
            return _conversations(Path(source), tokenizer, length, leading)
    return list(_blocks(source, tokenizer, length, leading))


def _blocks(source: str | Path, tokenizer: Any | None, length: int, leading: Sequence[int]) -> Iterator[Example]:
    ids = token_stream(read_documents(source, tokenizer=tokenizer), tokenizer)
    size = length - len(leading)
    for start in range(0, len(ids), size):
        block = np.array([*leading, *ids[start : start + size]], dtype=np.int64)
        if len(block) >= min(length, LEAST_BLOCK):
            yield Example(block, np.arange(len(block)) >= max(1, len(leading)))


def _conversations(path: Path, tokenizer: Any | None, length: int, leading: Sequence[int]) -> list[Example]:
    """Examples of conversations. Each piece is tokenised separately, as a chat prompt is, after the leading ids."""
    if tokenizer is None:
        raise TrainingDataError(
            f"The model has no tokenizer to read {path} with", "Put the tokenizer's files next to the model"
        )
    examples = []
    for place, row in read_rows(path):
        ids: list[int] = []
        learned: list[bool] = []
        for text, is_answer in _pieces(place, row, tokenizer):
            found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
            ids += found
            learned += [is_answer] * len(found)
        if tuple(ids[: len(leading)]) != tuple(leading):  # many chat templates write the leading ids themselves
            ids, learned = [*leading, *ids], [False] * len(leading) + learned
        learned = [False, *learned[1:]]
        if any(learned[:length]):
            tokens = np.array(ids[:length], dtype=np.int64)
            examples.append(Example(tokens, np.array(learned[:length]), prompt=learned.index(True)))
    if not examples:
        raise TrainingDataError(
            f"No conversation of {path} has an answer within its first {length} tokens", "Use a larger --max-seq-length"
        )
    return examples


def _pieces(place: str, row: dict[str, Any], tokenizer: Any) -> list[tuple[str, bool]]:
    """The conversation as text, cut where an answer begins or ends: (text, whether it is an answer)."""
    messages = row.get("messages")
    if not isinstance(messages, list):
        given = [row.get(name) or "" for name in ("instruction", "input", "output")]
        if not given[0] or not all(isinstance(text, str) for text in given):
            raise TrainingDataError(
                f"{place} has neither `messages` nor the strings `instruction` and `output`",
                "Give all lines of the file one form: `text`, `messages`, or `instruction` and `output`",
            )
        instruction, more, output = given
        if not output:
            raise TrainingDataError(f"{place} has no `output`", "Give each instruction an answer")
        if not getattr(tokenizer, "chat_template", None):
            question = f"{_INSTRUCTION}{instruction}{_INPUT + more if more else ''}{_RESPONSE}"
            return [(question, False), (output + (getattr(tokenizer, "eos_token", None) or ""), True)]
        question = "\n\n".join(text for text in (instruction, more) if text)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    pieces: list[tuple[str, bool]] = []
    done = ""
    for before, answer in answer_turns(place, messages, tokenizer, error=TrainingDataError):
        if not before.startswith(done):
            raise TrainingDataError(
                f"{place} cannot be cut into questions and answers: the chat template rewrites earlier turns",
                "Give conversations of one answer each",
            )
        pieces += [(before[len(done) :], False), (answer, True)]
        done = before + answer
    if not pieces:
        raise TrainingDataError(f"{place} has no message of the role `assistant`", "Give each conversation an answer")
    return pieces
