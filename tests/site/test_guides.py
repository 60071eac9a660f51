"""The examples of the guides for extending, carried out as they stand: a new file, and a line in the registry."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.export.gguf_models import family_folder
from tests.pipeline import tiny

from saap.models.loading.pretrained import load

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ("new-importance", "new-strategy", "new-method", "new-export-format")
ADDED = {"importance": ("roots", "token-change"), "strategy": ("deep",), "method": ("mean-input",)}
BLOCK = re.compile(r'^```python title="(src/[\w/]+\.py)(?:: (\w+))?"\n(.*?)^```', re.DOTALL | re.MULTILINE)
SCRIPT = """
import json, sys
import saap
from saap.settings.prune import PruneConfig
source, added = sys.argv[1], json.loads(sys.argv[2])
settings = dict(pruning_ratio=0.2, effort="fast", samples=4, sample_length=32, restore=False, align=8)
found = {}
for kind, names in added.items():
    for name in ("uniform" if kind == "strategy" else None, *names):
        plan = saap.prune(source, **settings, **({} if name is None else {kind: name})).plan
        found[f"{kind} {name}"] = {group: list(kept) for group, kept in plan.keep.items()}
    try:
        PruneConfig(pruning_ratios=(0.2,), **{kind: "unheard-of"})
    except Exception as error:
        found[f"{kind} wrong"] = str(error)
print(json.dumps(found))
"""


def apply(guide: Path, package: Path) -> list[str]:
    """Do what a guide says in a copy of the package. Returns the files that this touches."""
    touched = []
    for name, owner, code in BLOCK.findall(guide.read_text(encoding="utf-8")):
        file = package / Path(name).relative_to("src/saap")
        touched.append(name)
        if not owner:
            assert not file.exists()
            file.write_text(code)
            continue
        before, mark, rest = file.read_text().partition(f"class {owner}(")
        assert mark
        own, gap, others = rest.partition("\n\n\n")
        file.write_text(before + mark + own.rstrip("\n") + "\n" + code.rstrip("\n") + (gap or "\n") + others)
    return touched


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A folder with a copy of the package, extended by all guides."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "src" / "saap", folder / "saap", ignore=shutil.ignore_patterns("__pycache__"))
    for name in GUIDES:
        touched = apply(ROOT / "docs" / "guides" / f"{name}.md", folder / "saap")
        assert len(touched) >= 2
        assert all(len(set(touched[first : first + 2])) == 2 for first in range(0, len(touched), 2))
    return folder


def run(package: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """What becomes of a Python that finds this package."""
    environment = {**os.environ, "PYTHONPATH": str(package), "COLUMNS": "200"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=package)


def test_every_example_prunes_a_model(extended, tmp_path) -> None:
    done = run(extended, "-c", SCRIPT, tiny.folder(tmp_path / "dense"), json.dumps(ADDED))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    for kind, names in ADDED.items():
        for name in names:
            assert found[f"{kind} {name}"]
            assert name in found[f"{kind} wrong"]  # an error lists what there is
        plans = [json.dumps(found[f"{kind} {name}"]) for name in (("uniform" if kind == "strategy" else None), *names)]
        assert len(set(plans)) == len(plans)


def test_names_are_known_without_torch(extended) -> None:
    script = "import sys; from saap.settings.registry import Importance; print([*Importance], 'torch' in sys.modules)"
    done = run(extended, "-c", script)
    assert "token-change" in done.stdout
    assert done.stdout.strip().endswith("False")


def test_the_format_writes_a_file(extended, tmp_path) -> None:
    folder = family_folder(tmp_path / "model", "llama")
    done = run(extended, "-m", "saap", "export", folder, "--format", "npz", "--out", tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr
    assert "open it with numpy.load" in done.stdout
    weights = load(folder, device="cpu").state_dict()
    with np.load(tmp_path / "out.npz") as stored:
        assert set(stored) == set(weights)
        np.testing.assert_array_equal(stored["model.norm.weight"], weights["model.norm.weight"].numpy())


def test_help_and_refusals_know_the_format(extended, tmp_path) -> None:
    said = run(extended, "-m", "saap", "export", "--help").stdout
    assert "npz, the weights as a NumPy archive" in " ".join(said.split())
    refused = run(extended, "-m", "saap", "export", tmp_path, "--format", "npy", "--out", tmp_path / "out")
    assert refused.returncode == 2
    assert "npz" in refused.stderr.splitlines()[-1]
