"""Runs the recipes end to end on SmolLM2 with small numbers, and checks that a second run keeps every step.

    python benchmarks/recipes.py [NAME ...]      # default: all of recipes/
    python benchmarks/recipes.py --table         # the table in README.md, from benchmarks/results

The model, the texts and the tasks of a recipe are replaced as well: by SmolLM2, bundled text, and none.
Writes benchmarks/results/recipes.json: seconds, steps and outputs of each recipe.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from readme_tables import write_between_marks

HERE = Path(__file__).resolve().parent
RECIPES = HERE.parent / "recipes"
RESULT = HERE / "results" / "recipes.json"
SMALL = {
    "prune": ["effort=fast", "samples=4", "refit_tokens=2048"],
    "recover": ["max_steps=2", "length=128", "validate_every=1", "validation_samples=2"],
    "eval": ["texts=[bundled]", "tasks=[]", "window=128", "max_tokens=1024"],
}


def settings(recipe: Path, out: Path) -> list[str]:
    steps = yaml.safe_load(recipe.read_text())
    chosen = ["model=smollm2", f"out={out}"]
    for name, values in SMALL.items():
        for section in [f"eval.{key}" for key in steps.get("eval", {})] if name == "eval" else [name]:
            if name in steps:
                chosen += [f"{section}.{value}" for value in values]
    return [word for setting in chosen for word in ("--set", setting)]


def run(recipe: Path, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "saap", "run", str(recipe), "--json", *settings(recipe, out)]
    start = time.perf_counter()
    first = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    seconds = time.perf_counter() - start
    again = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return {
        "seconds": round(seconds, 1),
        "steps": {step["name"]: step["fate"] for step in first["steps"]},
        "second_run": sorted({step["fate"] for step in again["steps"]}),
        "perplexity": {
            file.stem: {name: text["value"] for name, text in json.loads(file.read_text())["perplexity"].items()}
            for file in sorted((out / "eval").glob("*.json"))
        },
    }


def table(results: dict[str, Any]) -> str:
    lines = ["| recipe | steps made | second run | s | perplexity |", "|---|---|---|---|---|"]
    for name, row in sorted(results.items()):
        made = ", ".join(step for step, fate in row["steps"].items() if fate == "made")
        values = sorted({f"{value:.1f}" for texts in row["perplexity"].values() for value in texts.values()})
        lines.append(
            f"| {name} | {made} | {', '.join(row['second_run'])} | {row['seconds']:.0f} | {', '.join(values)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = sorted(file.stem for file in RECIPES.glob("*.yaml"))
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*every, []])
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in [] if options.table else options.names or every:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = run(RECIPES / f"{name}.yaml", Path(folder) / "out")
        RESULT.write_text(json.dumps(results, indent=1) + "\n")
        print(name, json.dumps(results[name]))
    write_between_marks("recipes", table(results))


if __name__ == "__main__":
    main()
