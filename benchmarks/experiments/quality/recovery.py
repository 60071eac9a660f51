"""Gain of the recovery on texts not used for training."""

import math
import tempfile
from pathlib import Path
from typing import Any

from harness.digests import PRUNING
from harness.experiment import Cells, Measured, Names, Request, Values
from lab.commands import pruned_folder, saap
from lab.texts import INSTRUCTIONS, perplexities, texts
from lab.training import FEW_STEPS

MINUTES = 20
STATES = ("dense", "pruned", "quantised", "recovered", "dense tuned alike")
UNTRAINED = ["--max-steps", "1", "--learning-rate", "1e-12", "--max-seq-length", "64", "--batch-size", "1"]
"""A learning rate near zero, so that the initial zero points and scales are written."""
CELLS = STATES
OPTIONS = INSTRUCTIONS
SETTINGS = {"model": "{model}", "minutes": MINUTES, "effort": "fast"}
DECIDED_BY = (*PRUNING, "recovery", "pipeline/recover")


def measure(request: Request, wanted: Names) -> Measured:
    """Tune PRUNED and the dense model alike, both with the dense model as teacher."""
    shared = ["--data", "mixed", "--dense", request.model]
    flags = [*shared, *request.size(FEW_STEPS, ["--max-minutes", str(MINUTES)])]
    pruned = pruned_folder(request, "--effort", "fast", name="fast")
    tuned = {
        "quantised": (pruned, [*shared, *UNTRAINED]),
        "recovered": (pruned, flags),
        "dense tuned alike": (Path(request.model), flags),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        named = texts(request.given, folder)
        for state in wanted:
            found: dict[str, Any] = {}
            model = pruned if state == "pruned" else Path(request.model)
            if state in tuned:
                source, own = tuned[state]
                report = saap("recover", source, "--out", folder / state, *own)
                model = folder / state
                command = " ".join(["saap recover PRUNED", *(Path(word).name for word in own)])
                found = {"command": command, "tokens": report["tokens"], "seconds": report["seconds"]}
            yield state, {**found, "perplexity": perplexities(model, named, most=request.size(1024, 2**30))}


def summarise(cells: Cells) -> Values:
    found = {state: cells[state]["perplexity"] for state in STATES}
    logs = {state: {name: math.log(value) for name, value in each.items()} for state, each in found.items()}
    means = {state: sum(each.values()) / len(each) for state, each in logs.items()}
    return {
        **cells["recovered"], "perplexity": found,
        "ratio": {name: value / found["dense"][name] for name, value in found["recovered"].items()},
        "closed": {name: closed({state: each[name] for state, each in logs.items()}) for name in found["dense"]},
        "closed_mean": closed(means), "ratio_mean": math.exp(means["recovered"] - means["dense"]),
        "lost": {name: value / found["pruned"][name] - 1 for name, value in found["quantised"].items()},
    }  # fmt: skip


def closed(logs: Values) -> float:
    """Share of the gap in log-perplexity between the pruned and the dense model that is closed."""
    return float((logs["pruned"] - logs["recovered"]) / (logs["pruned"] - logs["dense"]))
