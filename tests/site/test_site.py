"""The documentation site: it builds without a warning, its links lead somewhere, nothing is loaded from elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import saap

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Page:
    """What a page refers to and what can be referred to in it."""

    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page()

    def handle_starttag(self, tag, attrs):
        given = {name: value or "" for name, value in attrs}
        self.page.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.page.links.append(given["href"])
        if tag in ("script", "img", "iframe", "source") and "src" in given:
            self.page.loaded.append(given["src"])
        if tag == "link" and "href" in given:
            self.page.loaded.append(given["href"])


def read_page(text: str) -> Page:
    reader = _Reader()
    reader.feed(text)
    return reader.page


def broken_links(pages: dict[Path, Page]) -> list[str]:
    """Links inside the site, of all pages, that lead to no file or to no anchor."""
    broken = []
    for path, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            missing_anchor = parts.fragment and unquote(parts.fragment) not in pages.get(target, Page()).anchors
            if not target.is_file() or missing_anchor:
                broken.append(f"{path.name}: {link}")
    return broken


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return out, done.stderr


@pytest.fixture(scope="module")
def pages(built) -> dict[Path, Page]:
    # The page of errors names its links from the root of a server.
    files = (file for file in built[0].rglob("*.html") if file.name != "404.html")
    return {file.resolve(): read_page(file.read_text(encoding="utf-8")) for file in files}


def test_the_site_builds_without_a_warning(built):
    assert "WARNING" not in built[1]
    assert (built[0] / "index.html").is_file()


def test_every_internal_link_leads_somewhere(pages):
    assert sum(len(page.links) for page in pages.values()) > 500
    assert broken_links(pages) == []


@pytest.mark.parametrize("link", ["missing.html", "#missing", "page.html#missing"])
def test_a_broken_link_is_seen(tmp_path, link):
    file = tmp_path / "page.html"
    file.write_text(f'<a href="{link}"></a>')
    assert broken_links({file: read_page(file.read_text())}) == [f"page.html: {link}"]


def test_nothing_is_loaded_from_elsewhere(pages):
    assert [loaded for page in pages.values() for loaded in page.loaded if urlsplit(loaded).netloc] == []


def test_the_reference_has_every_public_name_and_command(built, pages):
    documented = set().union(*(page.anchors for page in pages.values()))
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
