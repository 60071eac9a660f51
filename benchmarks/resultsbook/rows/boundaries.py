"""Group boundaries: does it matter which channels share a scale and a zero point?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resultsbook.charts import bars
from resultsbook.measures import mean_and_spread
from resultsbook.models import measured_text, open_dense, pruned_folder
from resultsbook.row import Cells, Experiment, Request, Row, Values
from saap.evaluation.perplexity import perplexity
from saap.models.devices import quick_float32_products
from saap.models.linear import weight_out_in
from saap.models.masking import replaced_weights
from saap.pipeline.inputs import RunOptions, open_model
from saap.records import ModelGraph, Role
from saap.recovery.quantise import quantise
from saap.reporting.figures import Figure

SIZES = (16, 32)
BITS = 4
RANDOM = "random"


def settings(request: Request) -> Values:
    return {
        "model": f"{request.model}, pruned by 20 % and restored", "bits": BITS, "group sizes": list(SIZES),
        "random orders": 1 if request.quick else 3, "measured tokens": 512 if request.quick else 8192, "seed": 0,
    }  # fmt: skip


def orders(request: Request) -> Sequence[str]:
    return ("natural", "by-size", *(f"{RANDOM}-{seed}" for seed in range(settings(request)["random orders"])))


def cells(request: Request) -> Sequence[str]:
    return [f"{order}-{size}" for size in SIZES for order in orders(request)]


def measure(request: Request, wanted: Sequence[str]) -> Iterator[tuple[str, Values]]:
    dense = open_dense(request.model)
    text = measured_text(dense, "wikitext2", settings(request)["measured tokens"])
    model = open_model(str(pruned_folder(request)), RunOptions(device="cpu")).model
    weights = reading_weights(model, dense.graph)
    with quick_float32_products():
        before = perplexity(model, text).value
        for cell in wanted:
            order, _, size = cell.rpartition("-")
            rounded = {path: in_order(weight, order, int(size)) for path, weight in weights.items()}
            with replaced_weights(model, rounded):
                after = perplexity(model, text).value
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
    found = {}
    for size in SIZES:
        of_size = {name.rpartition("-")[0]: cell for name, cell in cells.items() if name.endswith(f"-{size}")}
        drawn = [cell for order, cell in of_size.items() if order.startswith(RANDOM)]
        found[str(size)] = {
            **{
                order: {"error": of_size[order]["error"], "ratio": of_size[order]["ratio"]}
                for order in ("natural", "by-size")
            },
            RANDOM: {
                "error": mean_and_spread([cell["error"] for cell in drawn])[0],
                "ratio": mean_and_spread([cell["ratio"] for cell in drawn])[0],
                "spread": mean_and_spread([cell["ratio"] for cell in drawn])[1],
            },
        }
    of_32 = found["32"]
    return {
        "sizes": found,
        "natural": of_32["natural"]["ratio"],
        "random": of_32[RANDOM]["ratio"],
        "by_size": of_32["by-size"]["ratio"],
        "error_random_over_natural": of_32[RANDOM]["error"] / of_32["natural"]["error"],
        "error_by_size_over_natural": of_32["by-size"]["error"] / of_32["natural"]["error"],
        "group": 32,
        "matrices": next(iter(cells.values()))["matrices"],
    }


def figures(summary: Values) -> Sequence[Figure]:
    kinds = ("natural", "by-size", RANDOM)
    values = {f"groups of {size}": [one[kind]["error"] for kind in kinds] for size, one in summary["sizes"].items()}
    figure = bars(
        "boundaries", "Error of the quantisation by the order of the channels",
        "Relative squared error of the quantised weights by the order in which channels are grouped.",
        values, kinds, x="squared error / square of the weight",
    )  # fmt: skip
    return (figure,)


ROW = Row(
    name="boundaries",
    title="Group boundaries",
    question="Does it matter which channels share a scale: those that lie side by side after pruning, random ones, or "
    "channels of like size?",
    summarise=summarise,
    figures=figures,
    experiment=Experiment(cells=cells, settings=settings, measure=measure),
    limits="Quantisation alone, of the matrices that read FFN channels, which can be reordered for free. What the "
    "tuning of the groups makes of other boundaries has not been measured.",
)
