"""The web page of `saap chat`: one column for each model, with gradio."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from saap.cli.show.answers import heading
from saap.core.errors import SaapError
from saap.pipeline.evaluate.chat import Turns, replies, with_answers, with_question
from saap.pipeline.evaluate.generate import Speaker
from saap.settings.evaluate import GenerationSettings


def chat_page(speakers: tuple[Speaker, ...], settings: GenerationSettings) -> Any:
    """The page, not yet served. Each browser window has its own conversation."""
    empty: Turns = {speaker.label: [] for speaker in speakers}

    def columns(turns: Turns, found: dict[str, Any] | None = None) -> list[Any]:
        return [
            gr.update(value=turns[one.label], label=heading(one.label, one.weights, (found or {}).get(one.label)))
            for one in speakers
        ]

    def answer(question: str, turns: Turns) -> Iterator[list[Any]]:
        if not question.strip():
            return
        now, found = with_question(turns, question), {}
        yield ["", turns, *columns(now)]  # from here on, the next question can be typed
        try:
            for found in replies(speakers, now, settings):
                yield [gr.skip(), turns, *columns(with_answers(now, found), found)]
        except SaapError as error:
            gr.Warning(str(error))
            yield [question, turns, *columns(turns)]
            return
        yield [gr.skip(), with_answers(now, found), *columns(with_answers(now, found), found)]

    with gr.Blocks(title="saap chat", analytics_enabled=False) as page:
        turns = gr.State(empty)
        with gr.Row():
            boxes = [
                # plain text, so that no answer makes the browser fetch an image from elsewhere
                gr.Chatbot(
                    label=heading(one.label, one.weights), height="70vh", buttons=["copy"], render_markdown=False
                )
                for one in speakers
            ]
        question = gr.Textbox(label="Question", placeholder="Enter sends it to every model", autofocus=True)
        reset = gr.Button("New conversation")
        submitted = question.submit(answer, [question, turns], [question, turns, *boxes], show_progress="hidden")
        anew = [reset.click, *(box.clear for box in boxes)]  # the bin of one column clears all
        gr.on(
            anew, lambda: ["", empty, *columns(empty)], None, [question, turns, *boxes], show_progress="hidden",
            cancels=[submitted],
        )  # fmt: skip
    return page


def serve(speakers: tuple[Speaker, ...], settings: GenerationSettings, address: str, port: int) -> None:
    """Serve the page until it is interrupted."""
    fonts = ["system-ui", "sans-serif"]  # of the system: nothing is fetched from elsewhere
    theme = gr.themes.Default(font=fonts, font_mono=["monospace"])
    page = chat_page(speakers, settings)
    print(f"chat at http://{address}:{port}; Ctrl-C ends it", flush=True)
    page.queue().launch(server_name=address, server_port=port, theme=theme, footer_links=[], quiet=True)
