"""Token samples drawn from texts: fixed by the seed, and disjoint if the text is long enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from saap.core.errors import CalibrationError
from saap.core.records import CalibrationSet, IntArray
from saap.data.texts import KINDS, MIXED, names_a_source, read_documents
from saap.data.windows import SampleRequest, parts_by_weight, place, share_rows

if TYPE_CHECKING:
    from torch import Tensor

Calibration: TypeAlias = "str | Path | Sequence[str | Path] | Sequence[Sequence[int]] | IntArray | Tensor"

GIVEN_TEXTS = "given texts"
GIVEN_IDS = "given token ids"


def token_stream(texts: Sequence[str], tokenizer: Any | None) -> IntArray:
    """All token ids (n,) of the texts, joined by blank lines and tokenised once, without special tokens.

    Raises CalibrationError if there is no tokenizer.
    """
    if tokenizer is None:
        raise CalibrationError(
            "the model has no tokenizer, so a text cannot become token ids",
            "Put the tokenizer's files next to the model, or pass `tokenizer` in Python",
        )
    text = "\n\n".join(texts)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.truncation is None and backend.padding is None:
        # The same ids in less than half the time, because no offsets are recorded.
        ids = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
    else:
        # verbose=False: the whole text is meant to be longer than the model's context.
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return np.asarray(ids, dtype=np.int64).reshape(-1)


def leading_ids(tokenizer: Any | None, *, bos: bool = True) -> tuple[int, ...]:
    """Ids that the tokenizer prepends to every text by default: a BOS token, or in most cases nothing.

    Every window begins with them, as the training texts of the model did. bos: False for none.
    """
    if tokenizer is None or not bos:
        return ()
    plain, default = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    before = next((n for n in range(len(default)) if default[n : n + len(plain)] == plain), 0)
    return tuple(int(token) for token in default[:before])


def draw_sets(
    calibration: Calibration,
    tokenizer: Any | None,
    requests: Sequence[SampleRequest],
    *,
    seed: int,
    vocabulary: int | None = None,
    bos: bool = True,
    kind_weights: Mapping[str, int] = KINDS,
) -> dict[str, CalibrationSet]:
    """Sets of windows from one calibration, by the requests' names.

    calibration: names and files (see `read_documents`), texts (strings with white space, or of 256 characters and more,
    that are not files), or token ids (rows, length). Each source provides an equal part of each set, the kinds of
    `mixed` by `kind_weights`. Windows of texts are at random positions, chosen by `seed`, and do not overlap. If a text
    is too short, all sets that are not held out share its tokens. Each window begins with the `leading_ids`, unless
    `bos` is False. Rows of token ids are assigned to the sets as a whole and cut to the requested length. If there are
    too few, held-out sets get at most a quarter of them, and sets may be smaller than requested.
    vocabulary: number of rows of the model's embedding.
    Raises CalibrationError if the text is too short (with the needed and found tokens), a source cannot be read, or an
    id is outside the vocabulary.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    ids = given_ids(calibration)
    if ids is not None:
        names: tuple[str, ...] = (GIVEN_IDS,)
        windows = share_rows(ids, requests, generator)
    else:
        sources = token_sources(calibration, tokenizer)
        names = tuple(sources)
        windows = _from_texts(sources, requests, leading_ids(tokenizer, bos=bos), generator, kind_weights)
    check_vocabulary(windows, vocabulary, None if ids is not None else tokenizer)
    return {name: CalibrationSet(sources=names, seed=seed, tokens=tokens) for name, tokens in windows.items()}


def calibration_set(
    calibration: Calibration,
    tokenizer: Any | None,
    *,
    samples: int,
    length: int,
    seed: int,
    vocabulary: int | None = None,
    bos: bool = True,
) -> CalibrationSet:
    """A set of `samples` windows of `length` tokens (see `draw_sets`); rows of token ids are not split."""
    ids = given_ids(calibration)
    if ids is None:
        request = SampleRequest("samples", samples, length)
        return draw_sets(calibration, tokenizer, [request], seed=seed, vocabulary=vocabulary, bos=bos)["samples"]
    check_vocabulary({GIVEN_IDS: ids}, vocabulary, None)
    return CalibrationSet(sources=(GIVEN_IDS,), seed=seed, tokens=ids)


def includes_mixed(calibration: Calibration) -> bool:
    """Whether `mixed` is the calibration or one of its sources."""
    given = [calibration] if isinstance(calibration, str) else calibration
    return isinstance(given, Sequence) and any(isinstance(item, str) and item == MIXED for item in given)


def token_sources(calibration: Any, tokenizer: Any | None) -> dict[str, dict[str, IntArray]]:
    """Per source, its token streams by kind."""
    given = [calibration] if isinstance(calibration, (str, Path)) else list(calibration)
    if not given:
        raise CalibrationError("the calibration is empty", f"Specify a text file or `{MIXED}`")
    texts = [item for item in given if isinstance(item, str) and not names_a_source(item)]
    # A source that is listed twice is still one text: it cannot provide more tokens.
    named = dict.fromkeys(item for item in given if isinstance(item, Path) or names_a_source(item))
    kinds = {str(item): KINDS if item == MIXED else (item,) for item in named}
    sources = {
        name: {str(kind): token_stream(read_documents(kind, tokenizer=tokenizer), tokenizer) for kind in of}
        for name, of in kinds.items()
    }
    return sources | ({GIVEN_TEXTS: {GIVEN_TEXTS: token_stream(texts, tokenizer)}} if texts else {})


def _from_texts(
    sources: Mapping[str, Mapping[str, IntArray]],
    requests: Sequence[SampleRequest],
    leading: Sequence[int],
    generator: np.random.Generator,
    kind_weights: Mapping[str, int],
) -> dict[str, IntArray]:
    bodies = [replace(request, length=request.length - len(leading)) for request in requests]
    windows: dict[str, list[IntArray]] = {request.name: [] for request in requests}
    by_source = [parts_by_weight(request.sequences, [1] * len(sources)) for request in requests]
    for index, streams in enumerate(sources.values()):
        weights = [kind_weights.get(kind, 1) for kind in streams] if len(streams) > 1 else [1]
        by_kind = [parts_by_weight(parts[index], weights) for parts in by_source]
        for position, (text, stream) in enumerate(streams.items()):
            parts = [body.part(counts[position]) for body, counts in zip(bodies, by_kind, strict=True)]
            starts = place(text, len(stream), parts, generator)
            for body in bodies:
                windows[body.name] += [
                    np.array([*leading, *stream[start : start + body.length]]) for start in starts[body.name]
                ]
    lengths = {request.name: request.length for request in requests}
    # Shuffled, so that the first or last part of a set is not one kind of text only.
    return {
        name: np.array(taken, np.int64).reshape(-1, lengths[name])[generator.permutation(len(taken))]
        for name, taken in windows.items()
    }


def given_ids(calibration: Any) -> IntArray | None:
    """Token ids (rows, length) if that is what was given, else None."""
    if isinstance(calibration, (str, Path)):
        return None
    if isinstance(calibration, Sequence) and (not calibration or isinstance(calibration[0], (str, Path))):
        return None
    remedy = "Give integers of shape (samples, length), length at least 2"
    try:
        ids = np.asarray(calibration.cpu() if hasattr(calibration, "cpu") else calibration)
    except ValueError as error:
        raise CalibrationError("the token ids have rows of different lengths", remedy) from error
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise CalibrationError(f"the token ids have shape {ids.shape} and type {ids.dtype}", remedy)
    return ids.astype(np.int64)


def check_vocabulary(windows: Mapping[str, IntArray], vocabulary: int | None, tokenizer: Any | None) -> None:
    """Raise CalibrationError for an id outside the model's embedding of `vocabulary` rows."""
    if vocabulary is None:
        return
    ids = np.concatenate([tokens.ravel() for tokens in windows.values()])
    least, largest = int(ids.min()), int(ids.max())
    if least < 0 or largest >= vocabulary:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        origin = "the token ids given" if tokenizer is None else f"the tokenizer {name} ({len(tokenizer)} tokens)"
        raise CalibrationError(
            f"{origin} gave id {least if least < 0 else largest}, but the model's embedding has {vocabulary} rows",
            "Use the tokenizer that belongs to the model",
        )
