"""Pages of the documentation site that are made from the code while the site is built (a hook of MkDocs)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent


def commands_page() -> str:
    """The help of every command as Markdown."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    call = [sys.executable, "-m", "typer", "saap.cli.app", "utils", "docs", "--name", "saap", "--title", "Commands"]
    done = subprocess.run(call, check=True, capture_output=True, text=True, encoding="utf-8", env=environment)
    return done.stdout


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    return files
