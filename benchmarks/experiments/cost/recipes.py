"""The recipes end to end on SmolLM2 with small numbers, and a second run that must keep every step.

The model, the texts and the tasks of a recipe are replaced as well: by SmolLM2, bundled text, and none.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from harness.experiment import Cells, Experiment, Measured, Request, Values
from harness.store import ROOT
from lab.commands import saap

RECIPES = ROOT / "recipes"
SMALL = {
    "prune": ["effort=fast", "samples=4", "refit_tokens=2048"],
    "recover": ["max_steps=2", "length=128", "validate_every=1", "validation_samples=2"],
    "eval": ["texts=[bundled]", "tasks=[]", "window=128", "max_tokens=1024"],
}


def replaced(recipe: Path, model: str, out: Path) -> list[str]:
    """The flags that make a recipe small."""
    steps = yaml.safe_load(recipe.read_text())
    chosen = [f"model={model}", f"out={out}"]
    for name, values in SMALL.items():
        for section in [f"eval.{key}" for key in steps.get("eval", {})] if name == "eval" else [name]:
            if name in steps:
                chosen += [f"{section}.{value}" for value in values]
    return [word for setting in chosen for word in ("--set", setting)]


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder:
            yield name, run(RECIPES / f"{name}.yaml", request.model, Path(folder) / "out")


def run(recipe: Path, model: str, out: Path) -> Values:
    """Seconds, steps and perplexities of a recipe, and what a second run did."""
    command = ["run", recipe, *replaced(recipe, model, out)]
    start = time.perf_counter()
    first = saap(*command)
    seconds = time.perf_counter() - start
    again = saap(*command)
    return {
        "seconds": round(seconds, 1),
        "steps": {step["name"]: step["fate"] for step in first["steps"]},
        "second_run": sorted({step["fate"] for step in again["steps"]}),
        "perplexity": {
            file.stem: {name: text["value"] for name, text in json.loads(file.read_text())["perplexity"].items()}
            for file in sorted((out / "eval").glob("*.json"))
        },
    }


def summarise(cells: Cells) -> dict[str, Any]:
    rows = {
        name: {
            "made": [step for step, fate in cells[name]["steps"].items() if fate == "made"],
            "second_run": cells[name]["second_run"],
            "seconds": cells[name]["seconds"],
            "perplexity": sorted({v for texts in cells[name]["perplexity"].values() for v in texts.values()}),
        }
        for name in sorted(cells)
    }
    return {"rows": rows, "count": len(rows), "kept": sum(row["second_run"] == ["kept"] for row in rows.values())}


EXPERIMENT = Experiment(
    name="recipes", cells=lambda request: sorted(file.stem for file in RECIPES.glob("*.yaml")), measure=measure,
    summarise=summarise, smoke=False,
)  # fmt: skip
