"""What the guide to a new export format says is enough, carried out in a copy of the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.export.gguf_models import family_folder

import saap
from saap.models.loading.pretrained import load

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "guides" / "new-export-format.md"


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and the two changes of the guide."""
    copy = tmp_path_factory.mktemp("extended")
    shutil.copytree(Path(saap.__file__).parent, copy / "saap", ignore=shutil.ignore_patterns("__pycache__"))
    module, line = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (copy / "saap" / "export" / "npz.py").write_text(module)
    registry = copy / "saap" / "settings" / "registry.py"
    text = registry.read_text()
    place = text.index("\n\nclass RuntimeName")
    registry.write_text(text[:place] + line + text[place:])
    return copy


def saap_in(package: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(package), "COLUMNS": "200"}
    command = [sys.executable, "-m", "saap", *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=package, capture_output=True, text=True, check=False)


def test_the_format_of_the_guide_writes_a_file(extended: Path, tmp_path: Path) -> None:
    folder = family_folder(tmp_path / "model", "llama")
    done = saap_in(extended, "export", folder, "--format", "npz", "--out", tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr
    assert "open it with numpy.load" in done.stdout
    weights = load(folder, device="cpu").state_dict()
    with np.load(tmp_path / "out.npz") as stored:
        assert set(stored) == set(weights)
        np.testing.assert_array_equal(stored["model.norm.weight"], weights["model.norm.weight"].numpy())


def test_help_and_refusals_know_the_format(extended: Path, tmp_path: Path) -> None:
    assert "npz, the weights as a NumPy archive" in " ".join(saap_in(extended, "export", "--help").stdout.split())
    refused = saap_in(extended, "export", tmp_path, "--format", "npy", "--out", tmp_path / "out")
    assert refused.returncode == 2
    assert "npz" in refused.stderr.splitlines()[-1]
