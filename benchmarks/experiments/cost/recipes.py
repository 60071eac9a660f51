"""The recipes end to end on SmolLM2 with small numbers, and a second run that must keep every step."""

import json
import tempfile
import time
from pathlib import Path

import yaml
from harness.digests import MAKING
from harness.experiment import Cells, Measured, Names, Request, Values
from harness.store import ROOT
from lab.commands import saap

RECIPES = ROOT / "recipes"
SMALL = {
    "prune": ["effort=fast", "num_samples=4", "refit_tokens=2048"],
    "recover": ["max_steps=2", "max_seq_length=128", "validate_every=1", "validation_samples=2"],
    "eval": ["texts=[bundled]", "tasks=[]", "window=128", "max_tokens=1024"],
}
CELLS = sorted(file.stem for file in RECIPES.glob("*.yaml"))
SMOKE = False
DECIDED_BY = (*MAKING, "export", "pipeline/recipe")


def replaced(recipe: Path, model: str, out: Path) -> list[str]:
    steps = yaml.safe_load(recipe.read_text())
    chosen = [f"model={model}", f"out={out}"]
    for name, values in SMALL.items():
        sections = [f"eval.{key}" for key in steps.get("eval", {})] if name == "eval" else [name]
        chosen += [f"{section}.{value}" for section in sections for value in values if name in steps]
    return [word for setting in chosen for word in ("--set", setting)]


def measure(request: Request, wanted: Names) -> Measured:
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder:
            out, recipe = Path(folder) / "out", RECIPES / f"{name}.yaml"
            command = ["run", recipe, *replaced(recipe, request.model, out)]
            start = time.perf_counter()
            first = saap(*command)
            seconds, again = time.perf_counter() - start, saap(*command)
            yield name, {
                "seconds": round(seconds, 1),
                "steps": {step["name"]: step["fate"] for step in first["steps"]},
                "second_run": sorted({step["fate"] for step in again["steps"]}),
                "perplexity": {
                    file.stem: {text: v["value"] for text, v in json.loads(file.read_text())["perplexity"].items()}
                    for file in sorted((out / "eval").glob("*.json"))
                },
            }  # fmt: skip


def summarise(cells: Cells) -> Values:
    rows = {}
    for name, cell in sorted(cells.items()):
        made = [step for step, fate in cell["steps"].items() if fate == "made"]
        values = sorted({value for texts in cell["perplexity"].values() for value in texts.values()})
        rows[name] = {**cell, "made": made, "perplexity": values}
    return {"rows": rows, "count": len(rows), "kept": sum(row["second_run"] == ["kept"] for row in rows.values())}
