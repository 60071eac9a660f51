"""`saap generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Annotated

from saap.cli.flags import Argument
from saap.core.errors import ConfigurationError
from saap.settings.evaluate import DenseSettings, GenerationSettings, writing_flag
from saap.settings.run import OPENS, Display, RunOptions
from saap.settings.setting import Only, Settings


class Question(Settings):
    """The prompt."""

    prompt: Annotated[str, writing_flag("Prompt, the user's turn for a chat model. [required]")] = ""


def generate(
    model: Annotated[str, Argument("Folder written by saap, or any model that `saap prune` accepts.")],
    question: Question,
    comparison: DenseSettings,
    settings: GenerationSettings,
    options: Annotated[RunOptions, Only(OPENS)],
    display: Annotated[Display, Only(("as_json",))],
) -> None:
    """Answer a prompt with MODEL and with the dense model that it was pruned from."""
    from saap.cli.show.answers import draw_columns
    from saap.pipeline.evaluate.generate import answers, open_speakers
    from saap.pipeline.shared.dense_model import DenseChoice

    if not question.prompt.strip():
        raise ConfigurationError("--prompt is empty", "Give a text to answer")
    choice = None if comparison.no_dense else DenseChoice.of(comparison, comparison.dense)
    speakers = open_speakers(model, choice, options)
    rounds = answers(speakers, question.prompt, settings)
    if display.as_json:
        *_, last = [{speaker.label: "" for speaker in speakers}, *rounds]
        print(json.dumps({"prompt": question.prompt, **last}, ensure_ascii=False, indent=1))
    elif sys.stdout.isatty():
        draw_columns(rounds)
    else:
        _print(rounds)


def _print(rounds: Iterable[Mapping[str, str]]) -> None:
    """For pipes and logs: stream the first answer, then print the others, which were generated meanwhile."""
    texts: Mapping[str, str] = {}
    shown = 0
    for number, texts in enumerate(rounds):
        label, text = next(iter(texts.items()))
        if number == 0:
            print(f"{label}: ", end="")
        ready = text.rstrip("\N{REPLACEMENT CHARACTER}")  # an incomplete character is not printed yet
        print(ready[shown:], end="", flush=True)
        shown = max(shown, len(ready))
    print()
    for label, text in list(texts.items())[1:]:
        print(f"{label}: {text}")
