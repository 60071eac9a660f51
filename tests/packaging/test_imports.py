"""The command line and `import saap` answer at once: nothing heavy is loaded before it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "accelerate", "datasets", "matplotlib", "pydantic", "numpy")


def loaded_by(statement: str) -> set[str]:
    program = f"import sys; {statement}; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    return set(found.stdout.splitlines()[-1].split()) if found.stdout.strip() else set()


def test_the_check_sees_what_is_loaded():
    assert loaded_by("import torch") >= {"torch", "numpy"}


@pytest.mark.parametrize("statement", ["import saap", "import saap.cli.app", "import saap; saap.SaapError"])
def test_nothing_heavy_is_loaded(statement):
    assert loaded_by(statement) == set()


@pytest.mark.parametrize("arguments", ["--help", "prune --help", "run --help", "--version"])
def test_help_loads_nothing_heavy(arguments):
    call = f"from saap.cli.app import app; app({arguments.split()!r}, standalone_mode=False)"
    assert loaded_by(call) <= {"pydantic"}  # the settings are its models


def test_every_public_name_exists():
    program = "import saap; print(*(name for name in saap.__all__ if not hasattr(saap, name)))"
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert found.stdout.split() == []
