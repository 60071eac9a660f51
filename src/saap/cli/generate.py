"""`saap generate`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

from saap.core.errors import ConfigurationError
from saap.settings.evaluate import DenseSettings, GenerationSettings, writing_flag
from saap.settings.run import OPENS, Display, RunOptions
from saap.settings.setting import Only, Settings


class Question(Settings):
    """The prompt."""

    prompt: Annotated[str, writing_flag("Prompt, the user's turn for a chat model. [required]")] = ""


def generate(
    model: Annotated[str, "Folder written by saap, or any model that `saap prune` accepts."],
    question: Question,
    comparison: DenseSettings,
    settings: GenerationSettings,
    options: Annotated[RunOptions, Only(OPENS)],
    display: Annotated[Display, Only(("as_json",))],
) -> None:
    """Answer a prompt with MODEL and with the dense model that it was pruned from."""
    from saap.cli.show.answers import draw_columns, print_in_turn
    from saap.pipeline.evaluate.chat import replies, with_question
    from saap.pipeline.evaluate.generate import open_speakers

    if not question.prompt.strip():
        raise ConfigurationError("--prompt is empty", "Give a text to answer")
    speakers = open_speakers(model, comparison, options)
    labels = {speaker.label: speaker.label for speaker in speakers}
    rounds = replies(speakers, with_question({label: [] for label in labels}, question.prompt), settings)
    if display.as_json:
        *_, last = rounds
        texts = {label: reply.text for label, reply in last.items()}
        print(json.dumps({"prompt": question.prompt, **texts}, ensure_ascii=False, indent=1))
    elif sys.stdout.isatty():
        draw_columns({label: reply.text for label, reply in found.items()} for found in rounds)
    else:
        print_in_turn(rounds, labels)
