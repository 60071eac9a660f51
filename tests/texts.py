"""Bundled texts and their tokens, read once for all tests of a session and for the processes that they start."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from tests import found

SHORT = 10_000
"""Texts of fewer characters are tokenised as quickly as they are found again."""
MEASURED_TOKENS, ANSWER_TOKENS = {"EVALUATION_TOKENS": 150, "KIND_TOKENS": 40}, 8
"""Of each kind of text, and enough for a few words."""
_READ: dict[str, bytes] = {}

Setting = Callable[[Any, str, Any], object]
"""`setattr`, or what undoes it after a test."""


def share(setting: Setting) -> None:
    """Read and tokenise the same text once."""
    texts, samples = import_module("saap.data.texts"), import_module("saap.data.samples")
    setting(texts, "bundled_text", remembering_texts(texts.bundled_text))
    stream = remembering_tokens(samples.token_stream)
    users = (
        "data.samples",
        "data.training",
        "pipeline.shared.tokens",
        "pipeline.evaluate.run",
        "pipeline.prune.vocabulary",
    )
    for name in users:
        setting(import_module(f"saap.{name}"), "token_stream", stream)


def measure_little(setting: Setting) -> None:
    """Measure models on little text, and let them answer in a few words."""
    for name, tokens in MEASURED_TOKENS.items():
        setting(import_module("saap.pipeline.shared.tokens"), name, tokens)
    setting(import_module("saap.pipeline.shared.outcome"), "ANSWER_TOKENS", ANSWER_TOKENS)


def remembering_texts(stock: Callable[..., str]) -> Callable[..., str]:
    def bundled_text(kind: str, purpose: Any, tokenizer: Any | None = None) -> str:
        template = getattr(tokenizer, "chat_template", None)
        form = (template, tokenizer.special_tokens_map) if tokenizer is not None and template else ()
        read = _remembered(("text", kind, str(purpose), form), lambda: stock(kind, purpose, tokenizer).encode())
        return read.decode()

    return bundled_text


def remembering_tokens(stock: Callable[..., Any]) -> Callable[..., Any]:
    def token_stream(texts: Sequence[str], tokenizer: Any | None) -> Any:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or backend.truncation or backend.padding or sum(map(len, texts)) < SHORT:
            return stock(texts, tokenizer)
        key = ("tokens", backend.to_str(), hashlib.sha256("\n\n".join(texts).encode()).hexdigest())
        return np.load(BytesIO(_remembered(key, lambda: _bytes_of(stock(texts, tokenizer)))))

    return token_stream


def _bytes_of(array: Any) -> bytes:
    file = BytesIO()
    np.save(file, array)
    return file.getvalue()


def _remembered(key: tuple[Any, ...], make: Callable[[], bytes]) -> bytes:
    """What was made for the key, by this process or another one of the session."""
    name = hashlib.sha256(repr(key).encode()).hexdigest()
    if name not in _READ:
        folder = os.environ.get(found.FOLDER)
        file = Path(folder) / name if folder else None
        if file is not None and file.exists():
            _READ[name] = file.read_bytes()
        else:
            _READ[name] = make()
            if file is not None:
                found.write(file, _READ[name])
    return _READ[name]
