"""The Modelfile that imports a GGUF file into Ollama."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SYSTEM, _USER, _ANSWER, _AGAIN = "\x02system\x02", "\x02user\x02", "\x02answer\x02", "\x02again\x02"
_CONTEXT_LIMIT = 8192
_TEMPLATE = (
    "{{- range $index, $message := .Messages }}"
    '{{ if eq .Role "system" }}OPENING{{ .Content }}'
    '{{ else if eq .Role "user" }}{{ if eq $index 0 }}BEFORE{{ else if eq (index $.Messages 0).Role "system" }}'
    "{{ if eq $index 1 }}AFTER SYSTEM{{ else }}AFTER ANSWER{{ end }}{{ else }}AFTER ANSWER{{ end }}{{ .Content }}"
    '{{ else if eq .Role "assistant" }}ANSWER{{ .Content }}{{ end }}{{ end }}END'
)


def modelfile(file: Path, tokenizer: Any | None, *, context: int) -> str:
    """Text of a Modelfile next to `file`: path of the weights, chat template in Ollama's language, stop strings.

    Source: Ollama's documentation of Modelfile and template. A chat template that does more than put text around
    messages is left out; Ollama then uses the one in the GGUF file.
    """
    lines = [f"FROM ./{file.name}", f"PARAMETER num_ctx {min(context, _CONTEXT_LIMIT)}"]
    template = chat_template(tokenizer) if tokenizer is not None else None
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    stop = getattr(tokenizer, "eos_token", None)
    if isinstance(stop, str) and '"' not in stop:
        lines.append(f'PARAMETER stop "{stop}"')
    return "\n".join(lines) + "\n"


def chat_template(tokenizer: Any) -> str | None:
    """The tokenizer's chat template in Ollama's language, derived by rendering; None if absent or not expressible."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    user = {"role": "user", "content": _USER}
    dialogue = [user, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _AGAIN}]
    turns = _pieces(tokenizer, dialogue, (_USER, _ANSWER, _AGAIN))
    if turns is None or any('"""' in piece or "{{" in piece for piece in turns):
        return None
    before, to_answer, after_answer, end = turns
    if to_answer != end:  # past answers must begin like the generated one
        return None
    system = _pieces(tokenizer, [{"role": "system", "content": _SYSTEM}, user], (_SYSTEM, _USER))
    # llama.cpp puts the first token of every text there itself
    first = str(tokenizer.bos_token) if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
    before = before.removeprefix(first)
    opening, after_system = ("", before) if system is None else (system[0].removeprefix(first), system[1])
    in_order = {
        "OPENING": opening, "AFTER SYSTEM": after_system, "AFTER ANSWER": after_answer, "BEFORE": before,
        "ANSWER": to_answer, "END": end,
    }  # fmt: skip
    return re.sub("|".join(in_order), lambda mark: in_order[mark[0]], _TEMPLATE)


def _pieces(tokenizer: Any, messages: Sequence[dict[str, str]], marks: Sequence[str]) -> list[str] | None:
    """The texts before, between and after the marks in the rendered messages; None if rendering fails."""
    try:
        rest = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except Exception:  # a template may raise anything, e.g. for an unknown role
        return None
    pieces = []
    for mark in marks:
        piece, found, rest = rest.partition(mark)
        if not found:
            return None
        pieces.append(piece)
    return [*pieces, rest]
