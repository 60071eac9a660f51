"""The documentation site: it builds without a warning, also of a link to nowhere, and loads nothing from elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import saap

ROOT = Path(__file__).resolve().parents[2]


class Page(HTMLParser):
    """What a page loads, and what can be referred to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag in ("script", "img", "iframe", "source") and "src" in given:
            self.loaded.append(given["src"])
        if tag == "link" and "href" in given:
            self.loaded.append(given["href"])


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return out, done.stderr


@pytest.fixture(scope="module")
def pages(built) -> list[Page]:
    return [Page(file.read_text(encoding="utf-8")) for file in built[0].rglob("*.html")]


def test_the_site_builds_without_a_warning(built):
    assert "WARNING" not in built[1]
    assert (built[0] / "index.html").is_file()


def test_nothing_is_loaded_from_elsewhere(pages):
    assert [loaded for page in pages for loaded in page.loaded if urlsplit(loaded).netloc] == []


def test_the_reference_has_every_public_name_and_command(built, pages):
    documented = set().union(*(page.anchors for page in pages))
    records = {"ModelGraph", "CoupledGroup", "ImportanceScores", "StructurePlan"}
    words = {"Role", "Layout"}
    names = {f"saap.{name}" for name in saap.__all__ if name not in {*records, *words, "SaapError", "__version__"}}
    names |= {f"saap.core.records.{name}" for name in records} | {"saap.core.errors.SaapError"}
    names |= {f"saap.core.roles.{name}" for name in words}
    assert names - documented == set()
    commands = (built[0] / "reference" / "commands.html").read_text(encoding="utf-8")
    for command in (
        "prune",
        "recover",
        "eval",
        "compare",
        "export",
        "report",
        "run",
        "inspect",
        "generate",
        "chat",
        "demo",
    ):
        assert f"<code>saap {command}</code>" in commands
    assert "--pruning-ratio" in commands
    settings = (built[0] / "reference" / "settings.html").read_text(encoding="utf-8")
    for name in ("pruning_ratio", "max_grad_norm", "max_new_tokens", "output_dir"):
        assert f"<code>{name}</code>" in settings
