"""Image and text: the decoder of a model that reads images, pruned by text alone or by pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from harness.charts import lines
from harness.experiment import Cells, Experiment, Measured, Request, Values
from lab.commands import made_by_saap
from lab.pictures import FULL, TRIAL, described_pictures, told, trained_reader, write_pairs
from torch import nn

from saap.pipeline.shared.inputs import RunOptions, open_model
from saap.reporting.figures import Figure

CALIBRATIONS = {"descriptions": "the descriptions alone", "pairs": "pictures with their descriptions"}
DECODER = ("language_model.", "lm_head.")
RATIOS = (0.3, 0.6)


def settings(request: Request) -> Values:
    size = TRIAL if request.quick else FULL
    return {
        "model": f"LLaVA of {size.layers} layers, width {size.width}, FFN {size.inner}, a CLIP tower of 3 layers",
        "training": f"{size.steps} steps of {size.batch} drawn pictures",
        "pruning ratios": list(RATIOS[: 1 if request.quick else None]),
        "pairs": 200 if request.quick else 1000, "pictures to describe": 16 if request.quick else 400,
        "samples": 4 if request.quick else 50, "sample length": 32, "refit tokens": 2048,
        "seed": 0,
    }  # fmt: skip


def cells(request: Request) -> Sequence[str]:
    ratios = settings(request)["pruning ratios"]
    return ["dense", *(f"{calibration}-{ratio}" for calibration in CALIBRATIONS for ratio in ratios)]


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    chosen = settings(request)
    dense = trained_reader(request)
    processor = transformers.AutoProcessor.from_pretrained(dense)
    pictures = described_pictures(chosen["pictures to describe"], seed=2)
    kind = "trial" if request.quick else "pruned"
    pairs, descriptions = write_pairs(request.work / f"pictures-{kind}", chosen["pairs"])
    whole = open_model(str(dense), RunOptions(device="cpu")).model
    for cell in wanted:
        model = whole
        if cell != "dense":
            calibration, _, ratio = cell.partition("-")
            file = pairs if calibration == "pairs" else descriptions
            arguments = [
                "prune", str(dense), "--pruning-ratio", ratio, "--calibration", str(file), "--align", "16",
                "--samples", str(chosen["samples"]), "--sample-length", str(chosen["sample length"]),
                "--refit-tokens", str(chosen["refit tokens"]), *(["--effort", "fast"] if request.quick else []),
            ]  # fmt: skip
            folder = made_by_saap(request, f"picture-reader-{kind}-{cell}", arguments)
            model = open_model(str(folder), RunOptions(device="cpu")).model
        yield cell, {**told(model, processor, pictures), **other_tensors(whole, model)}


def other_tensors(dense: nn.Module, pruned: nn.Module) -> dict[str, Any]:
    """The tensors that do not belong to the text decoder: how many there are, and how many are the same bit by bit."""
    before, after = dense.state_dict(), pruned.state_dict()
    names = [name for name in before if not any(part in name for part in DECODER)]
    same = sum(name in after and torch.equal(before[name], after[name]) for name in names)
    return {"other_tensors": len(names), "other_tensors_same": same}


def summarise(cells: Cells) -> dict[str, Any]:
    dense = dict(cells["dense"])
    table = {
        calibration: {
            name.rpartition("-")[2]: dict(cell) for name, cell in cells.items() if name.startswith(calibration)
        }
        for calibration in CALIBRATIONS
    }
    ratios = list(table["pairs"])
    pruned = [cell for name, cell in cells.items() if name != "dense"]
    little, much = (
        {"ratio": float(ratio), **{calibration: rows[ratio]["facts"] for calibration, rows in table.items()}}
        for ratio in (ratios[0], ratios[-1])
    )
    return {
        "dense": dense, "table": table, "meaning": CALIBRATIONS,
        "little": little, "much": much,
        "other_tensors": dense["other_tensors"],
        "other_tensors_same": min(cell["other_tensors_same"] for cell in pruned), "seeds": [0],
    }  # fmt: skip


def figures(summary: Values) -> Sequence[Figure]:
    series = {
        calibration: ([0.0, *map(float, rows)], [summary["dense"]["facts"], *(row["facts"] for row in rows.values())])
        for calibration, rows in summary["table"].items()
    }
    figure = lines(
        "multimodal", "What is named rightly",
        "Share of the words that only the picture tells which the model puts first, against the pruning ratio.",
        series, x="pruning ratio", y="share", ticks=True,
    )  # fmt: skip
    return (figure,)


EXPERIMENT = Experiment(
    name="multimodal", cells=cells, settings=settings, measure=measure, summarise=summarise, figures=figures
)
