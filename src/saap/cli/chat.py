"""`saap chat`."""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Iterator
from functools import partial
from io import TextIOWrapper
from typing import Annotated, Any

from pydantic import Field

from saap.core.errors import ConfigurationError, SaapError
from saap.settings.evaluate import DenseSettings, GenerationSettings
from saap.settings.run import OPENS, RunOptions
from saap.settings.setting import Flag, Only, Settings

web_flag = partial(Flag, panel="Web page")
RESET = "/reset"
INTERRUPTED = "The answer was interrupted; Ctrl-C now ends the chat."
ADDRESS = "127.0.0.1"
"""Of the page: this machine alone."""


class WebSettings(Settings):
    """Where the page is served."""

    port: Annotated[int, Field(ge=1, le=65535), web_flag("Port on this machine.")] = 7860


class ChatPlace(Settings):
    """Where the conversation takes place."""

    web: Annotated[WebSettings | None, web_flag("Chat in the browser, not here."), Only(("port",))] = None


def chat(
    model: Annotated[str, "Folder written by saap, or any model that `saap prune` accepts."],
    place: ChatPlace,
    comparison: DenseSettings,
    settings: GenerationSettings,
    options: Annotated[RunOptions, Only(OPENS)],
) -> None:
    """Chat with MODEL and the dense model that it was pruned from, with their tokens/s and the memory of their weights.

    Questions are lines of the standard input, and each model keeps its own conversation; /reset begins a new one.
    Ctrl-C ends an answer, and at a question the program.
    """
    if place.web is not None:
        _check_web(place.web.port)
    from saap.pipeline.evaluate.generate import open_speakers

    speakers = open_speakers(model, comparison, options, without=lambda error: print(f"note: {error}", file=sys.stderr))
    if place.web is None:
        _talk(speakers, settings)
    else:
        from saap.cli.show.chat_page import serve

        serve(speakers, settings, ADDRESS, place.web.port)


def _check_web(port: int) -> None:
    """Raise ConfigurationError if no page could be served on the port later."""
    if importlib.util.find_spec("gradio") is None:
        raise ConfigurationError("--web needs the package gradio", "Run pip install 'saap[chat]'")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((ADDRESS, port))
        except OSError as error:
            problem = f"Port {port} cannot be used ({error.strerror})"
            raise ConfigurationError(problem, "Give another one with --port") from None


def _talk(speakers: tuple[Any, ...], settings: GenerationSettings) -> None:
    """Answer the lines of the standard input until it ends."""
    from saap.cli.show.answers import draw_columns, heading, print_in_turn
    from saap.pipeline.evaluate.chat import Reply, Turns, replies, with_answers, with_question

    empty: Turns = {speaker.label: [] for speaker in speakers}
    weights = {speaker.label: speaker.weights for speaker in speakers}
    turns, last = empty, dict[str, Reply]()

    def rounds(now: Turns) -> Iterator[dict[str, Reply]]:
        for found in replies(speakers, now, settings):
            last.update(found)
            yield found

    for question in _questions():
        if question == RESET:
            turns = empty
            continue
        now = with_question(turns, question)
        last.clear()
        try:
            if sys.stdout.isatty():
                draw_columns(
                    {heading(label, weights[label], reply): reply.text for label, reply in found.items()}
                    for found in rounds(now)
                )
            else:
                print_in_turn(rounds(now), {label: heading(label, size) for label, size in weights.items()})
            turns = with_answers(now, last)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            turns = with_answers(now, last) if last else turns
            print(f"\n{INTERRUPTED}", file=sys.stderr)
        except SaapError as error:
            if not sys.stdin.isatty():
                raise
            print(f"error: {error} Or begin a new conversation with {RESET}.", file=sys.stderr)


def _questions() -> Iterator[str]:
    """The lines that are not empty, with a prompt for whoever types them."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line:
            yield line
