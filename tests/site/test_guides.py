"""The examples of the guides for extending, carried out as they stand: a new file, and a line in the registry."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.pipeline import tiny

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ("new-importance", "new-strategy", "new-method")
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


def test_every_example_prunes_a_model(extended, tmp_path) -> None:
    source = tiny.folder(tmp_path / "dense")
    call = [sys.executable, "-c", SCRIPT, str(source), json.dumps(ADDED)]
    environment = {**os.environ, "PYTHONPATH": str(extended)}
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=environment, cwd=extended)
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
    environment = {**os.environ, "PYTHONPATH": str(extended)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment, cwd=extended
    )
    assert "token-change" in done.stdout
    assert done.stdout.strip().endswith("False")
