"""Answers of several models on a terminal, or one after the other for pipes and logs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from saap.pipeline.evaluate.chat import Reply


def draw_columns(rounds: Iterable[Mapping[str, str]]) -> None:
    """One column for each model, growing. rounds: texts by heading."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    with Live(console=Console(), vertical_overflow="visible") as live:
        for texts in rounds:
            table = Table(*texts, expand=True)
            table.add_row(*map(Text, texts.values()))
            live.update(table)


def print_in_turn(rounds: Iterable[Mapping[str, Reply]], headings: Mapping[str, str]) -> None:
    """Each answer as it grows, then its speed. rounds: replies by label, of models that answer one after the other."""
    replies: Mapping[str, Reply] = {}
    labels, shown = list(headings), dict[str, int]()

    def begin(last: int) -> None:
        """Print the headings up to that of a label; an answer before it that has none yet has ended at once."""
        for label in labels[len(shown) : last + 1]:
            print(f"{_speed(replies[[*shown][-1]]) if shown else ''}{headings[label]}: ", end="")
            shown[label] = 0

    for replies in rounds:
        for place, label in enumerate(labels):
            if replies[label].tokens:
                begin(place)
                ready = replies[label].text
                print(ready[shown[label] :], end="", flush=True)
                shown[label] = max(shown[label], len(ready))
    begin(len(labels))
    print(_speed(replies[labels[-1]]), end="", flush=True)


def _speed(reply: Reply) -> str:
    """The end of a printed answer."""
    rate = "" if reply.tokens_per_second is None else f", {reply.tokens_per_second:.1f} tokens/s"
    return f"\n  [{reply.tokens} tokens{rate}]\n"


def heading(label: str, weights: int, reply: Reply | None = None) -> str:
    """A model's label, the bytes of its weights, and its speed so far."""
    rate = None if reply is None else reply.tokens_per_second
    return f"{label}, {weights / 1e6:,.0f} MB" + ("" if rate is None else f", {rate:.1f} tokens/s")
