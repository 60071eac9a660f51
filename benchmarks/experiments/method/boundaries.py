"""Group boundaries: does it matter which channels share a scale and a zero point?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from harness.charts import bars
from harness.experiment import Cells, Experiment, Measured, Request, Values
from lab.commands import pruned_folder
from lab.dense import measured_text, open_dense
from lab.measures import mean_and_spread
from lab.training import trained_folder
from torch import Tensor, nn

from saap.core.records import ModelGraph, Role
from saap.models.loading.devices import quick_float32_products
from saap.models.structure.linear import weight_out_in
from saap.models.structure.masking import replaced_weights
from saap.pipeline.shared.inputs import RunOptions, open_model
from saap.recovery.quantise import quantise
from saap.reporting.figures import Figure

SIZES = (16, 32)
BITS = 4
RANDOM = "random"
MODELS = {
    "pruned": "the model of the book, pruned and restored; the weights it came from lie on a 4-bit grid of 32 inputs",
    "trained": "a LLaMA shape that the benchmark has trained, dense; its weights were never on a grid",
}


def settings(request: Request) -> Values:
    models = [f"{request.model}, pruned by 20 % and restored", "LLaMA shape, trained here"]
    return {
        "models": models, "bits": BITS, "group sizes": list(SIZES),
        "random orders": 1 if request.quick else 3, "measured tokens": 512 if request.quick else 8192, "seed": 0,
    }  # fmt: skip


def orders(request: Request) -> Sequence[str]:
    return ("natural", "by-size", *(f"{RANDOM}-{seed}" for seed in range(settings(request)["random orders"])))


def cells(request: Request) -> Sequence[str]:
    return [f"{model}-{order}-{size}" for model in MODELS for size in SIZES for order in orders(request)]


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    for kind in MODELS:
        names = [name for name in wanted if name.startswith(f"{kind}-")]
        if not names:
            continue
        dense = open_dense(request.model if kind == "pruned" else str(trained_folder(request, "llama")))
        text = measured_text(dense, "wikitext2", settings(request)["measured tokens"])
        model: nn.Module = dense.model
        if kind == "pruned":
            model = open_model(str(pruned_folder(request)), RunOptions(device="cpu")).model
        weights = reading_weights(model, dense.graph)
        with quick_float32_products():
            before = dense.perplexity(text, model)
            for cell in names:
                order, _, size = cell.partition("-")[2].rpartition("-")
                rounded = {path: in_order(weight, order, int(size)) for path, weight in weights.items()}
                with replaced_weights(model, rounded):
                    after = dense.perplexity(text, model)
                errors = [relative_error(weights[path], weight) for path, weight in rounded.items()]
                yield cell, {"error": sum(errors) / len(errors), "ratio": after / before, "matrices": len(errors)}


def reading_weights(model: nn.Module, graph: ModelGraph) -> dict[str, Tensor]:
    """The matrices that read FFN channels, (outputs, channels), by module path; of the dense graph what is left."""
    paths = [group.consumers[0].tensor.rpartition(".")[0] for group in graph.of_role(Role.FFN)]
    there = {name for name, _ in model.named_modules()}
    return {path: weight_out_in(model.get_submodule(path)).detach().float().clone() for path in paths if path in there}


def channel_order(weight: Tensor, order: str) -> Tensor:
    """Which channels lie side by side: as they are, by the norm of their columns, or at random (`random-SEED`)."""
    if order == "natural":
        return torch.arange(weight.shape[1])
    if order == "by-size":
        return torch.argsort(torch.linalg.vector_norm(weight, dim=0))
    seed = int(order.removeprefix(f"{RANDOM}-"))
    return torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(seed))


def in_order(weight: Tensor, order: str, group_size: int) -> Tensor:
    """The weight (outputs, channels) as groups of `group_size` channels in that order can say it, in its own order."""
    index = channel_order(weight, order)
    rounded = torch.empty_like(weight)
    rounded[:, index] = quantise(weight[:, index], group_size=group_size, bits=BITS).dequantised(weight.dtype)
    return rounded


def relative_error(weight: Tensor, rounded: Tensor) -> float:
    """Squared error over the square of the weight."""
    return float((weight - rounded).square().sum() / weight.square().sum())


def summarise(cells: Cells) -> dict[str, Any]:
    models = {model: {str(size): _of_size(model, size, cells) for size in SIZES} for model in MODELS}
    against = {
        model: {
            order: {name: of_32[order][name] / of_32["natural"][name] for name in ("error", "ratio")}
            for order in ("by-size", RANDOM)
        }
        for model, of_32 in ((model, sizes["32"]) for model, sizes in models.items())
    }
    return {
        "models": models,
        "meaning": MODELS,
        "against": against,
        "group": 32,
        "best": {model: _best(sizes["32"]) for model, sizes in models.items()},
        "matrices": {model: cells[f"{model}-natural-32"]["matrices"] for model in MODELS},
    }


def _best(orders: Values) -> str:
    """The order with the lowest perplexity."""
    return min(orders, key=lambda order: float(orders[order]["ratio"]))


def _of_size(model: str, size: int, cells: Cells) -> dict[str, Any]:
    of_size = {
        name.partition("-")[2].rpartition("-")[0]: cell
        for name, cell in cells.items()
        if name.startswith(f"{model}-") and name.endswith(f"-{size}")
    }
    drawn = [cell for order, cell in of_size.items() if order.startswith(RANDOM)]
    ratio, spread = mean_and_spread([cell["ratio"] for cell in drawn])
    error = mean_and_spread([cell["error"] for cell in drawn])[0]
    fixed = {order: {name: of_size[order][name] for name in ("error", "ratio")} for order in ("natural", "by-size")}
    return {**fixed, RANDOM: {"error": error, "ratio": ratio, "spread": spread}}


def figures(summary: Values) -> Sequence[Figure]:
    kinds = ("natural", "by-size", RANDOM)
    values = {
        f"{model}, groups of {size}": [one[kind]["error"] for kind in kinds]
        for model, sizes in summary["models"].items()
        for size, one in sizes.items()
    }
    figure = bars(
        "boundaries", "Error of the quantisation by the order of the channels",
        "Relative squared error of the quantised weights by the order in which channels are grouped.",
        values, kinds, x="squared error / square of the weight",
    )  # fmt: skip
    return (figure,)


EXPERIMENT = Experiment(
    name="boundaries", cells=cells, settings=settings, measure=measure, summarise=summarise, figures=figures
)
