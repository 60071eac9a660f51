"""The terminal animation: a recording has what a program printed and when, its drawing each state of each line."""

from __future__ import annotations

import gzip
import json
import os
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("pyte")
from scripts.terminal_animation import DRAWING, RECORDING, _printed, draw, played, record

PROGRAM = r"""
import time
for done in range(4):
    print(f"\r\x1b[2K\x1b[1A" * (done > 0) + f"\x1b[32mworking\x1b[0m {done}", flush=True)
    time.sleep(0.3)
print("\x1b[1mdone\x1b[0m <&> ✓")
"""


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recording")
    (folder / "program.py").write_text(PROGRAM)
    assert record(f"{sys.executable} {folder / 'program.py'}", folder / "terminal.cast.gz") == 0
    return folder / "terminal.cast.gz"


def test_a_recording_has_what_was_printed_and_when(recording: Path) -> None:
    head, *events = map(json.loads, gzip.decompress(recording.read_bytes()).decode().splitlines())
    assert head["version"] == 2
    assert "program.py" in head["command"]
    assert "done" in "".join(text for _, _, text in events)
    assert [at for at, _, _ in events] == sorted(at for at, _, _ in events)
    assert 0.9 < events[-1][0] < 60


def test_each_line_appears_in_turn_and_the_last_state_stays(recording: Path) -> None:
    player, took, length = played(recording)
    states = {span[1]: line for line in player.drawn for span in line.spans}
    assert {"working", "done"} <= states.keys()
    lines = [line for line in player.drawn if line.spans[0][1] == "working"]
    assert len(lines) >= 3
    assert [line.until is None for line in lines] == [False] * (len(lines) - 1) + [True]
    assert states["done"].since > lines[0].since
    assert states["done"].spans[0][2][1], "bold"
    assert 0 < took < length


def test_the_drawing_is_one_picture_that_loads_nothing(recording: Path) -> None:
    drawing = draw(recording)
    root = ElementTree.fromstring(drawing)
    assert "<&>" in "".join(root.itertext())
    assert not re.search(r"https?://(?!www\.w3\.org/)", drawing)
    assert str(Path.home()) not in drawing


def test_a_failed_run_is_not_recorded(recording: Path) -> None:
    before = recording.read_bytes()
    assert record(f"{sys.executable} -c 'raise SystemExit(3)'", recording) == 3
    assert recording.read_bytes() == before


def test_a_run_without_output_is_played(tmp_path: Path) -> None:
    assert record("true", tmp_path / "silent.cast.gz") == 0
    player, took, _ = played(tmp_path / "silent.cast.gz")
    assert took == 0
    assert player.drawn[0].spans[0][1] == "$ true"


def test_bytes_that_are_no_text_are_replaced_once() -> None:
    source, target = os.pipe()
    os.write(target, b"\xff\xe2\x9c")
    printed = _printed(source)
    assert next(printed) == "\N{REPLACEMENT CHARACTER}"
    os.write(target, b"\x93")
    os.close(target)
    assert list(printed) == ["\N{CHECK MARK}"]


@pytest.mark.skipif(not RECORDING.is_file(), reason="nothing has been recorded")
def test_the_shown_animation_is_that_of_the_recording() -> None:
    assert DRAWING.read_text(encoding="utf-8") == draw(RECORDING), "run `make animation`"
