"""`saap generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Annotated

from saap.cli.flags import Argument
from saap.core.errors import ConfigurationError
from saap.settings.evaluate import GenerationSettings, dense_flag, writing_flag
from saap.settings.recover import DENSE_CODE, DENSE_REVISION
from saap.settings.run import OPENS, Display, RunOptions
from saap.settings.setting import Only, Settings


class Question(Settings):
    """The prompt, and the models that answer it."""

    prompt: Annotated[str, writing_flag("Prompt, the user's turn for a chat model. [required]")] = ""
    dense: Annotated[
        str | None,
        dense_flag(
            "The dense model to compare with.", metavar="MODEL", old=("against",), default="what MODEL was pruned from"
        ),
    ] = None
    no_dense: Annotated[bool, dense_flag("Show MODEL alone.")] = False
    dense_revision: Annotated[str | None, dense_flag(DENSE_REVISION, default="as MODEL's manifest says")] = None
    dense_trust_remote_code: Annotated[bool, dense_flag(DENSE_CODE)] = False


def generate(
    model: Annotated[str, Argument("Folder written by saap, or any model that `saap prune` accepts.")],
    question: Question,
    settings: GenerationSettings,
    options: Annotated[RunOptions, Only(OPENS)],
    display: Annotated[Display, Only(("as_json",))],
) -> None:
    """Answer a prompt with MODEL and with the dense model that it was pruned from."""
    from saap.pipeline.evaluate.generate import answers, open_speakers
    from saap.pipeline.shared.dense_model import DenseChoice

    if question.no_dense and question.dense is not None:
        raise ConfigurationError("--no-dense and --dense were given together", "Give one of the two")
    if not question.prompt.strip():
        raise ConfigurationError("--prompt is empty", "Give a text to answer")
    choice = DenseChoice(
        source=question.dense, revision=question.dense_revision, trust_remote_code=question.dense_trust_remote_code
    )
    speakers = open_speakers(model, None if question.no_dense else choice, options)
    rounds = answers(speakers, question.prompt, settings)
    if display.as_json:
        *_, last = [{speaker.label: "" for speaker in speakers}, *rounds]
        print(json.dumps({"prompt": question.prompt, **last}, ensure_ascii=False, indent=1))
    elif sys.stdout.isatty():
        _draw(rounds)
    else:
        _print(rounds)


def _draw(rounds: Iterable[Mapping[str, str]]) -> None:
    """One column for each model, growing."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    with Live(console=Console(), vertical_overflow="visible") as live:
        for texts in rounds:
            table = Table(*texts, expand=True)
            table.add_row(*map(Text, texts.values()))
            live.update(table)


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
