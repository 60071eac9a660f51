"""Record a command in a terminal, and draw the recording as an animated SVG; see `make animation`.

    python scripts/terminal_animation.py record "saap prune smollm2 --pruning-ratio 0.2 --preset fast -o small/"
    python scripts/terminal_animation.py draw

The recording is an asciicast (version 2) with the times of the run. The drawing plays a long run faster and says so.
"""

from __future__ import annotations

import argparse
import codecs
import fcntl
import gzip
import json
import os
import pty
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "front"
RECORDING, DRAWING = FOLDER / "terminal.cast.gz", FOLDER / "terminal.svg"
COLUMNS, ROWS, SHOWN = 112, 40, 30
"""Size of the terminal, and how many of its lines the drawing shows."""
SECONDS, LINE_SECONDS, FRAME_SECONDS = 14.0, 0.09, 0.2
"""Length of the run as it is played, and the least time of a printed line and of a progress bar's state."""
FONT, WIDTH, HEIGHT, MARGIN = 14, 8.43, 19, 14
PAPER, INK = "#0d1117", "#e6edf3"
UP = "\x1b[1A"

Style = tuple[str, bool]
"""Colour, and whether it is bold."""
Spans = tuple[tuple[int, str, Style], ...]
"""Column, text and style of the parts of a line."""


def record(command: str, file: Path) -> int:
    """Run a command in a terminal of its own and write what it printed, and when, if it succeeds.

    Returns its exit status.
    """
    inner, outer = pty.openpty()
    fcntl.ioctl(outer, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
    head = {"version": 2, "width": COLUMNS, "height": ROWS, "timestamp": int(time.time()), "command": command}
    lines, begun = [json.dumps(head)], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            shlex.split(command), stdin=outer, stdout=outer, stderr=outer, close_fds=True, cwd=folder, env=environment
        )
        os.close(outer)
        for text in _printed(inner):
            lines.append(json.dumps([round(time.monotonic() - begun, 3), "o", text]))
            sys.stdout.write(text)
            sys.stdout.flush()
        status = process.wait()
    if status:
        return status
    file.parent.mkdir(parents=True, exist_ok=True)
    # A progress bar is printed ten times a second, almost the same each time.
    file.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    return status


def _printed(terminal: int) -> Iterator[str]:
    """Text as it arrives; whole characters only."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with suppress(OSError):  # the process has ended
        while read := os.read(terminal, 65536):
            if text := decoder.decode(read):
                yield text


@dataclass(frozen=True)
class Drawn:
    """A line as it looked from one time to another, in seconds as played. until: None to the end."""

    row: int
    spans: Spans
    since: float
    until: float | None


class Player:
    """A terminal with all that has scrolled out of it, fed with a recording."""

    def __init__(self, command: str, columns: int, rows: int) -> None:
        import pyte

        self.command = command
        self._screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=0.1)
        self._screen.set_mode(pyte.modes.LNM)
        self._stream = pyte.Stream(self._screen)
        self._seen: dict[int, tuple[Spans, float]] = {}
        self.drawn: list[Drawn] = []
        self.scrolled: list[tuple[float, int]] = [(0.0, 0)]
        self.feed(f"$ {command}\n", 0.0)

    def feed(self, text: str, at: float) -> None:
        """Print text, and note which lines look different since."""
        self._stream.feed(text)
        for row, spans in enumerate(self._lines()):
            before, since = self._seen.get(row, ((), at))
            if spans != before:
                if before:
                    self.drawn.append(Drawn(row, before, since, at))
                self._seen[row] = (spans, at)
        first = max(0, max((row for row, (spans, _) in self._seen.items() if spans), default=0) + 1 - SHOWN)
        if first != self.scrolled[-1][1]:
            self.scrolled.append((at, first))

    def end(self) -> None:
        """Note the lines that stay."""
        self.drawn += [Drawn(row, spans, since, None) for row, (spans, since) in self._seen.items() if spans]

    def _lines(self) -> list[Spans]:
        screen = self._screen
        rows = [*screen.history.top, *(screen.buffer[row] for row in range(screen.lines))]
        return [_spans([line[column] for column in range(screen.columns)]) for line in rows]


def _spans(characters: list[Any]) -> Spans:
    """The parts of one style in a line, without the blanks between them."""
    found: list[tuple[int, str, Style]] = []
    for column, character in enumerate(characters):
        style = (_colour(character.fg), bool(character.bold))
        if character.data.strip():
            if found and found[-1][2] == style and column - found[-1][0] - len(found[-1][1]) <= 1:
                start, text, _ = found[-1]
                found[-1] = (start, text.ljust(column - start) + character.data, style)
            else:
                found.append((column, character.data, style))
    return tuple(found)


def _colour(name: str) -> str:
    """The colour of a terminal's name for it."""
    from rich.terminal_theme import SVG_EXPORT_THEME

    names = ["black", "red", "green", "brown", "blue", "magenta", "cyan", "white"]
    if name in names:
        return SVG_EXPORT_THEME.ansi_colors[names.index(name)].hex
    return INK if name == "default" else f"#{name}" if len(name) == 6 else INK


def played(recording: Path) -> tuple[Player, float, float]:
    """The player at the end of a recording, how long the run took, and how long it is played."""
    head, *lines = gzip.decompress(recording.read_bytes()).decode().splitlines()
    header, events = json.loads(head), [json.loads(line) for line in lines]
    took = events[-1][0] if events else 0.0
    speed = max(1.0, took / SECONDS)
    player = Player(header["command"], header["width"], header["height"])
    now, waiting = 0.5, ""
    for real, _, text in events:
        at = max(now, 0.5 + real / speed)
        if UP in text or not text.endswith("\n"):  # a progress bar is drawn over itself
            waiting += text
            if at - now >= FRAME_SECONDS:
                player.feed(waiting, at)
                now, waiting = at, ""
            continue
        for line in (waiting + text).splitlines(keepends=True):
            at = max(at, now + LINE_SECONDS)
            player.feed(line, at)
            now = at
        waiting = ""
    player.feed(waiting, now + LINE_SECONDS)
    player.end()
    return player, took, now + LINE_SECONDS


def draw(recording: Path) -> str:
    """The recording as an SVG that plays once. Where motion is unwanted, it shows the end."""
    player, took, length = played(recording)
    width, height = COLUMNS * WIDTH + 2 * MARGIN, SHOWN * HEIGHT + 3 * MARGIN
    steps = "".join(
        f"{100 * at / length:.2f}%{{transform:translateY({-first * HEIGHT}px)}}" for at, first in player.scrolled
    )
    last = -player.scrolled[-1][1] * HEIGHT
    note = f"{took:.0f} seconds" + (f", played in {length:.0f}" if took > length else "")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img">'
        f"<title>{escape(player.command)}</title><style>"
        f"text{{font:{FONT}px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre}}"
        f".b{{font-weight:bold}}.l{{visibility:hidden}}"
        f"@keyframes on{{from,to{{visibility:visible}}}}"
        f"@keyframes scroll{{{steps}to{{transform:translateY({last}px)}}}}"
        f".s{{animation:scroll {length:.2f}s step-end forwards}}"
        "@media(prefers-reduced-motion:reduce){.l{animation:none!important}.e{visibility:visible}"
        f".s{{animation:none;transform:translateY({last}px)}}}}</style>"
        f'<rect width="100%" height="100%" rx="8" fill="{PAPER}"/>'
        f'<text x="{width - MARGIN:.0f}" y="{height - 8}" text-anchor="end" fill="#8b949e" font-size="12">{note}</text>'
        f'<svg x="{MARGIN}" y="{MARGIN}" width="{width - 2 * MARGIN:.0f}" height="{SHOWN * HEIGHT}"><g class="s">'
        + "\n".join(map(_line, player.drawn))
        + "</g></svg></svg>\n"
    )


def _line(line: Drawn) -> str:
    """A line, visible from one time to another or to the end."""
    lasts = "1ms" if line.until is None else f"{line.until - line.since:.2f}s"
    animation = f"on {lasts} {line.since:.2f}s{' forwards' if line.until is None else ''}"
    parts = "".join(
        f'<tspan x="{column * WIDTH:.2f}" textLength="{len(text) * WIDTH:.2f}" lengthAdjust="spacingAndGlyphs" '
        f'class="{"b" if bold else "t"}" fill="{colour}">{escape(text)}</tspan>'
        for column, text, (colour, bold) in line.spans
    )
    kind = "l" if line.until is not None else "l e"
    return f'<text class="{kind}" y="{line.row * HEIGHT + FONT}" style="animation:{animation}">{parts}</text>'


def main() -> None:
    """Record or draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "draw"))
    parser.add_argument("command", nargs="?", help="to record")
    parser.add_argument("--recording", type=Path, default=RECORDING)
    parser.add_argument("--drawing", type=Path, default=DRAWING)
    given = parser.parse_args()
    if given.action == "record":
        if not given.command:
            parser.error("record takes a command")
        sys.exit(record(given.command, given.recording))
    given.drawing.write_text(draw(given.recording), encoding="utf-8")


if __name__ == "__main__":
    main()
