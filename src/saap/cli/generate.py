"""`saap generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Annotated

import typer

from saap.cli.options import AsJson, DenseRevision, DenseTrustRemoteCode, Device


def generate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder that saap wrote, or any model that `saap prune` takes.")
    ],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to answer, a user's turn for a chat model.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model to show beside it. [default: the one it was pruned from]"),
    ] = None,
    dense_revision: DenseRevision = None,
    dense_trust_remote_code: DenseTrustRemoteCode = False,
    no_dense: Annotated[bool, typer.Option("--no-dense", help="Show MODEL alone.")] = False,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens of the answer, at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token; above: sampled.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    no_chat: Annotated[
        bool, typer.Option("--no-chat", help="Continue the text itself, without the chat template.")
    ] = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Let MODEL answer a prompt, beside the dense model that it was pruned from."""
    from saap.core.errors import ConfigurationError
    from saap.pipeline.evaluate.generate import GenerationSettings, answers, open_speakers

    if no_dense and against is not None:
        raise ConfigurationError("--no-dense and --against were given together", "Give one of the two")
    settings = GenerationSettings(max_tokens=max_tokens, temperature=temperature, seed=seed, chat=not no_chat)
    if not prompt.strip():
        raise ConfigurationError("--prompt is empty", "Give a text to answer")
    speakers = open_speakers(
        model, against=against, dense=not no_dense, dense_revision=dense_revision,
        dense_trust_remote_code=dense_trust_remote_code, device=device,
    )  # fmt: skip
    rounds = answers(speakers, prompt, settings)
    if as_json:
        *_, last = [{speaker.label: "" for speaker in speakers}, *rounds]
        print(json.dumps({"prompt": prompt, **last}, ensure_ascii=False, indent=1))
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
    """For pipes and logs: the first answer as it grows, then the others, which were written meanwhile."""
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
