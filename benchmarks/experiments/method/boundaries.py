"""Group boundaries: effect of the order of channels, which determines those that share a scale and zero point."""

import torch
from harness.charts import bars
from harness.experiment import Cells, Figures, Measured, Names, Request, Scaled, Values
from lab.commands import pruned_folder
from lab.dense import model_in, opened
from lab.measures import mean_and_spread
from lab.texts import TEXTS
from lab.training import trained_folder
from torch import Tensor, nn

from saap.core.records import ModelGraph, Role
from saap.models.structure.linear import weight_out_in
from saap.models.structure.masking import replaced_weights
from saap.recovery.quantise import quantise

SIZES = (16, 32)
BITS = 4
RANDOM = "random"
FIXED = ("natural", "by-size")
MODELS = {
    "pruned": "the model of the book, pruned and restored; the weights it came from lie on a 4-bit grid of 32 inputs",
    "trained": "a LLaMA shape that the benchmark has trained, dense; its weights were never on a grid",
}
SETTINGS = {
    "models": ["{model}, pruned by 20 % and restored", "LLaMA shape, trained here"], "bits": BITS,
    "group sizes": list(SIZES), "random orders": Scaled(1, 3), "measured tokens": Scaled(512, 8192), "seed": 0,
}  # fmt: skip


def cells(request: Request) -> Names:
    orders = (*FIXED, *(f"{RANDOM}-{seed}" for seed in range(request.settings["random orders"])))
    return [f"{model}-{order}-{size}" for model in MODELS for size in SIZES for order in orders]


def measure(request: Request, wanted: Names) -> Measured:
    for kind in MODELS:
        names = [name for name in wanted if name.startswith(f"{kind}-")]
        if not names:
            continue
        with opened(request.model if kind == "pruned" else str(trained_folder(request, "llama"))) as dense:
            text = dense.text(TEXTS["wikitext2"], request.settings["measured tokens"])
            model: nn.Module = dense.model
            if kind == "pruned":
                model = model_in(pruned_folder(request))
            weights = consumer_weights(model, dense.graph)
            before = dense.perplexity(text, model)
            for cell in names:
                order, _, size = cell.partition("-")[2].rpartition("-")
                rounded = {path: in_order(weight, order, int(size)) for path, weight in weights.items()}
                with replaced_weights(model, rounded):
                    after = dense.perplexity(text, model)
                errors = [relative_error(weights[path], weight) for path, weight in rounded.items()]
                yield cell, {"error": sum(errors) / len(errors), "ratio": after / before, "matrices": len(errors)}


def consumer_weights(model: nn.Module, graph: ModelGraph) -> dict[str, Tensor]:
    """Consumers of FFN channels that pruning kept, (outputs, channels), by module path."""
    paths = [group.consumers[0].tensor.rpartition(".")[0] for group in graph.of_role(Role.FFN)]
    there = {name for name, _ in model.named_modules()}
    return {path: weight_out_in(model.get_submodule(path)).detach().float().clone() for path in paths if path in there}


def channel_order(weight: Tensor, order: str) -> Tensor:
    """Order of the channels: original, by the norm of their columns, or random (`random-SEED`)."""
    if order == "natural":
        return torch.arange(weight.shape[1])
    if order == "by-size":
        return torch.argsort(torch.linalg.vector_norm(weight, dim=0))
    seed = int(order.removeprefix(f"{RANDOM}-"))
    return torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(seed))


def in_order(weight: Tensor, order: str, group_size: int) -> Tensor:
    """The weight (outputs, channels) quantised in groups of `group_size` channels in that order; columns unchanged."""
    index = channel_order(weight, order)
    rounded = torch.empty_like(weight)
    rounded[:, index] = quantise(weight[:, index], group_size=group_size, bits=BITS).dequantised(weight.dtype)
    return rounded


def relative_error(weight: Tensor, rounded: Tensor) -> float:
    return float((weight - rounded).square().sum() / weight.square().sum())


def summarise(cells: Cells) -> Values:
    models = {model: {str(size): of_size(model, size, cells) for size in SIZES} for model in MODELS}
    of_32 = {model: sizes["32"] for model, sizes in models.items()}
    against = {
        model: {order: one[order]["error"] / one["natural"]["error"] for order in ("by-size", RANDOM)}
        for model, one in of_32.items()
    }
    return {
        "models": models, "meaning": MODELS, "against": against, "group": 32,
        "best": {model: min(one, key=lambda order: float(one[order]["ratio"])) for model, one in of_32.items()},
        "matrices": {model: cells[f"{model}-natural-32"]["matrices"] for model in MODELS},
    }  # fmt: skip


def of_size(model: str, size: int, cells: Cells) -> dict[str, Values]:
    same = {name: cell for name, cell in cells.items() if name.endswith(f"-{size}")}
    drawn = [cell for name, cell in same.items() if name.startswith(f"{model}-{RANDOM}-")]
    ratio, spread = mean_and_spread([cell["ratio"] for cell in drawn])
    error = mean_and_spread([cell["error"] for cell in drawn])[0]
    fixed = {order: {n: cells[f"{model}-{order}-{size}"][n] for n in ("error", "ratio")} for order in FIXED}
    return {**fixed, RANDOM: {"error": error, "ratio": ratio, "spread": spread}}


def figures(summary: Values) -> Figures:
    kinds = (*FIXED, RANDOM)
    values: dict[str, list[float]] = {}
    for model, sizes in summary["models"].items():
        values |= {f"{model}, groups of {size}": [one[k]["error"] for k in kinds] for size, one in sizes.items()}
    return [bars("boundaries", values, kinds, x="squared error / square of the weight")]
