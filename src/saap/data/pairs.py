"""Image-text pairs: a .jsonl file of `image` (a relative path) and `text`, read by the model's processor."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from saap.core.errors import CalibrationError, first_line
from saap.core.records import CalibrationSet, IntArray
from saap.data.texts import has_rows, is_file, read_rows
from saap.data.windows import SampleRequest, share_rows

MOST_PAIRS = 1024
"""Limit on the pairs whose images are read."""


Pair = tuple[str, Path, str]
"""A pair: its location in words, an existing image, and a text."""


def pairs_file(calibration: Any) -> Path | None:
    """The file of image-text pairs in a calibration, None if there is none.

    Raises CalibrationError if the calibration has other sources too, or the file cannot be read.
    """
    given = [calibration] if isinstance(calibration, (str, Path)) else calibration
    if not isinstance(given, Sequence) or not all(isinstance(item, (str, Path)) for item in given):
        return None
    files = [Path(item) for item in given if has_rows(item)]
    found = [file for file in files if "image" in next((row for _, row in read_rows(file)), {})]
    if found and len(given) > 1:
        raise CalibrationError(
            f"{found[0]} has image-text pairs, which cannot be mixed with other texts",
            "Give this file alone, or texts without images",
        )
    return found[0] if found else None


def read_pairs(path: Path) -> tuple[Pair, ...]:
    """All pairs of a file. Raises CalibrationError with file and line for a malformed pair or a missing image."""
    pairs = []
    for place, row in read_rows(path):
        image, text = row.get("image"), row.get("text")
        if not isinstance(image, str) or not isinstance(text, str) or not text.strip():
            raise CalibrationError(f"{place} needs both `image` and `text`", "Give each line the two, as strings")
        file = path.parent / image
        if not is_file(file):
            raise CalibrationError(f"{place} has the image {image}, which is missing", "Put it next to the file")
        pairs.append((place, file, text))
    return tuple(pairs)


def draw_pairs(
    path: Path, processor: Any, requests: Sequence[SampleRequest], *, image_ids: tuple[int, ...], seed: int
) -> dict[str, CalibrationSet]:
    """Sets of rows by name: each row is one pair, padded with the texts of other pairs to the length of the longest.

    processor: of the model; it writes `image_ids` in place of the image, which have no loss (`ignored` of the sets).
    Each set has enough rows for the requested tokens. If there are too few pairs, sets share them as rows of given ids
    do. Of pairs with the same ids only the first one counts. Raises CalibrationError.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    pairs = read_pairs(path)
    chosen = [pairs[index] for index in generator.permutation(len(pairs))[:MOST_PAIRS]]
    encoded = [_encode(pair, processor, image_ids) for pair in chosen]
    length = max(len(one) for one, _ in encoded)
    filling = _text_alone(chosen, processor, image_ids)
    rows, inputs = [], []
    for place, (one, given) in enumerate(encoded):
        room = length - len(one)
        start = place * max(1, len(filling) // len(encoded))
        rows.append(np.concatenate([one, np.take(filling, range(start, start + room), mode="wrap")]))
        of_tokens = (1, len(one))
        inputs.append({
            name: np.pad(value, ((0, 0), (0, room))) if value.shape == of_tokens else value
            for name, value in given.items()
        })  # fmt: skip
    ids, first = np.unique(np.stack(rows), axis=0, return_index=True)
    order = np.argsort(first)  # of equal rows the first one alone: an image is found by the ids of its row
    ids, inputs = ids[order], [inputs[place] for place in first[order]]
    rows_for = [replace(one, sequences=max(2, -(-one.tokens // length)), length=1, at_least=1) for one in requests]
    shares = share_rows(np.arange(len(ids)).reshape(-1, 1), rows_for, generator, "image-text pairs")
    return {
        name: CalibrationSet(
            sources=(str(path),), seed=seed, tokens=ids[places[:, 0]], ignored=image_ids,
            inputs=tuple(inputs[place] for place in places[:, 0]),
        )
        for name, places in shares.items()
    }  # fmt: skip


def _encode(pair: Pair, processor: Any, image_ids: tuple[int, ...]) -> tuple[IntArray, dict[str, np.ndarray[Any, Any]]]:
    """Token ids (tokens,), and further model inputs; inputs of shape (1, tokens) have one entry per token."""
    place, file, text = pair
    try:
        from PIL import Image
    except ImportError:
        raise CalibrationError("Images are read with the package pillow", "Run pip install 'saap[images]'") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file).convert("RGB")
    except (OSError, ValueError, Warning, Image.DecompressionBombError) as error:
        raise CalibrationError(
            f"{place} has {file.name}, which cannot be read as an image", "Replace the image"
        ) from error
    try:
        made = processor(text=[_prompt(text, processor)], images=[image], return_tensors="np")
    except Exception as error:  # each family's processor raises its own errors
        raise CalibrationError(
            f"{place} is rejected by {type(processor).__name__} ({first_line(error)})",
            "Correct the text or the image",
        ) from error
    ids = np.asarray(made["input_ids"], dtype=np.int64)[0]
    if not np.isin(ids, image_ids).any():
        raise CalibrationError(f"{place} is too long for its image", "Shorten the text")
    others = {name: np.asarray(value) for name, value in made.items() if name not in ("input_ids", "attention_mask")}
    return ids, others


def _prompt(text: str, processor: Any) -> str:
    """The text with an image placeholder: its own, that of the chat template, or one at the beginning."""
    # Some processors replace another token by the image tokens and their delimiters.
    mark = str(getattr(processor, "boi_token", None) or processor.image_token)
    if mark in text or str(processor.image_token) in text:
        return text
    if getattr(processor, "chat_template", None):
        question = {"role": "user", "content": [{"type": "image"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        return str(processor.apply_chat_template([question, answer], tokenize=False))
    return f"{mark}\n{text}"


def _text_alone(pairs: Sequence[Pair], processor: Any, image_ids: tuple[int, ...]) -> IntArray:
    """Ids (n,) of all texts without any special token."""
    text = "\n\n".join(["", *(text for _, _, text in pairs)])
    ids = np.asarray(processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    kept: IntArray = ids[~np.isin(ids, [*image_ids, *processor.tokenizer.all_special_ids])]
    if not len(kept):
        raise CalibrationError("the image-text pairs have no text", "Give each image its text")
    return kept
