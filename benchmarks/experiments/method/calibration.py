"""Calibration: number, length and kind of samples, one factor at a time, selection only."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from harness.charts import lines
from harness.experiment import Cells, Figures, Measured, Names, Request, Scaled, Values
from lab.commands import VALIDATION
from lab.dense import Dense, Ratios, opened
from lab.measures import as_bits, from_bits, geometric_mean, jaccard, mean_and_spread, removed_units
from lab.texts import TEXTS
from lab.training import trained_folder

from saap.core.records import CalibrationSet, Role, StructurePlan
from saap.data.texts import MIXED
from saap.data.training import Example
from saap.recovery.on_policy import continued

RATIO = 0.2
GENERATED, WIKITEXT2 = "generated", "wikitext2"
MODELS = {"large": "the model of the book", "small": "a LLaMA shape that the benchmark has trained"}


class Setting(NamedTuple):
    samples: int
    length: int
    kind: str

    def __str__(self) -> str:
        return f"{self.samples}x{self.length}-{self.kind}"

    def only(self, factor: str, other: "Setting") -> bool:
        return all(getattr(self, name) == getattr(other, name) for name in self._fields if name != factor)


KINDS = [WIKITEXT2, "novels", "speeches", "encyclopaedia", "conversations", MIXED, GENERATED]
SETTINGS = {
    "models": ["{model}", "LLaMA shape, trained here"], "pruning ratio": RATIO, "seeds": Scaled([0, 1], [0, 1, 2]),
    "numbers of samples": Scaled([2, 4], [5, 10, 20, 30, 40, 50, 100, 200]),
    "lengths": Scaled([16, 32], [64, 128, 256, 512]), "kinds": Scaled(KINDS[:2], KINDS),
    "standard": Scaled([4, 32, WIKITEXT2], [50, 128, WIKITEXT2]), "measured tokens": Scaled(256, 2048),
}  # fmt: skip


def every_setting(request: Request) -> list[Setting]:
    """The settings of each factor, with the other two at their standard, in the order of measuring."""
    chosen = request.settings
    standard = Setting(*chosen["standard"])
    varied = {"samples": chosen["numbers of samples"], "length": chosen["lengths"], "kind": chosen["kinds"]}
    every = {standard._replace(**{factor: value}) for factor, values in varied.items() for value in values}
    return sorted(every, key=lambda s: (s.kind != WIKITEXT2, s.kind, s.length, s.samples))


def cells(request: Request) -> Names:
    seeds, every = request.settings["seeds"], every_setting(request)
    return [f"{model}-{setting}-{seed}" for model in MODELS for seed in seeds for setting in every]


def parsed(cell: str) -> tuple[Setting, int]:
    _, size, *kind, seed = cell.split("-")
    samples, _, length = size.partition("x")
    return Setting(int(samples), int(length), "-".join(kind)), int(seed)


def measure(request: Request, wanted: Names) -> Measured:
    for model in MODELS:
        names = [name for name in wanted if name.startswith(f"{model}-")]
        if names:
            with opened(request.model if model == "large" else str(trained_folder(request, "llama"))) as dense:
                yield from of_model(request, dense, names)


def of_model(request: Request, dense: Dense, wanted: Names) -> Measured:
    ratios = Ratios(dense, request.settings["measured tokens"])
    drawn: dict[tuple[int, str, int], CalibrationSet] = {}
    for name in wanted:
        setting, seed = parsed(name)
        key = (setting.length, setting.kind, seed)
        if key not in drawn:
            drawn[key] = samples_of(request, dense, setting, seed)
        first = dataclasses.replace(drawn[key], tokens=drawn[key].tokens[: setting.samples])
        plan = dense.plan(dense.fused(first), RATIO)
        yield name, {"ratio": ratios.masked(plan), "removed": as_bits(numbered(dense, plan))}


def numbered(dense: Dense, plan: StructurePlan) -> set[int]:
    """The removed FFN channels, numbered over all modules."""
    groups = dense.graph.of_role(Role.FFN)
    starts = itertools.accumulate((group.units for group in groups), initial=0)
    first = {group.name: start for group, start in zip(groups, starts, strict=False)}
    return {first[group] + unit for group, unit in removed_units(plan, dense.graph) if group in first}


def samples_of(request: Request, dense: Dense, setting: Setting, seed: int) -> CalibrationSet:
    """Samples for the largest setting of this text and length; smaller settings use the first ones."""
    most = max(other.samples for other in every_setting(request) if setting.only("samples", other))
    if setting.kind == GENERATED:
        written = continued(
            dense.model, random_starts(dense.loaded.tokenizer, most, seed), length=setting.length, ends=(), seed=seed
        )
        return CalibrationSet(sources=(GENERATED,), seed=seed, tokens=np.stack([one.tokens for one in written]))
    source = VALIDATION if setting.kind == WIKITEXT2 else setting.kind
    return dense.samples(source, seed, scored=(most, setting.length))["scored"]


def random_starts(tokenizer: Any, count: int, seed: int) -> list[Example]:
    """A random ordinary token each to continue from, for diverse texts (as in LLM-QAT, Liu et al. 2023)."""
    special = set(tokenizer.all_special_ids)
    ordinary = np.array([token for token in range(len(tokenizer)) if token not in special])
    chosen = np.random.default_rng(seed).choice(ordinary, size=count)
    return [Example(np.array([token, token]), np.array([False, True]), prompt=1) for token in chosen]


def summarise(cells: Cells) -> Values:
    by_model: dict[str, dict[Setting, list[Values]]] = {model: {} for model in MODELS}
    for name, cell in cells.items():
        by_model[name.partition("-")[0]].setdefault(parsed(name)[0], []).append(cell)
    names = sorted({setting for found in by_model.values() for setting in found})
    # the standard is part of all three factors, so it has the most common value of each
    standard = Setting(*(Counter(values).most_common(1)[0][0] for values in zip(*names, strict=True)))
    models = {
        model: {str(setting): of_setting(found[setting], found[standard]) for setting in names if setting in found}
        for model, found in by_model.items()
    }
    large = models["large"]
    factors = {factor: [s for s in names if s.only(factor, standard)] for factor in Setting._fields}
    means = {factor: [large[str(setting)]["mean"] for setting in same] for factor, same in factors.items()}
    spans = {factor: max(values) / min(values) for factor, values in means.items()}
    few, many, longest = factors["samples"][0], factors["samples"][-1], factors["length"][-1]
    return {
        "models": models, "meaning": MODELS, "standard": str(standard), "spans": spans,
        "factors": {factor: [str(setting) for setting in same] for factor, same in factors.items()},
        "mixed": next((str(setting) for setting in factors["kind"] if setting.kind == MIXED), str(standard)),
        "values": {str(setting): list(setting) for setting in names},
        "few": {"samples": few.samples, **large[str(few)]},
        "many": {"samples": many.samples, **large[str(many)]},
        "longest": {"tokens": longest.length, **large[str(longest)]},
        "standard_mean": large[str(standard)]["mean"],
        "widest": max(spans, key=lambda factor: spans[factor]),
        "seeds": sorted({parsed(name)[1] for name in cells}),
    }  # fmt: skip


def of_setting(found: Sequence[Values], standard: Sequence[Values]) -> dict[str, Any]:
    """Perplexity ratios and overlaps over the seeds of one setting. standard: the cells of the standard one."""
    sets, others = ([from_bits(cell["removed"]) for cell in cells] for cells in (found, standard))
    pairs = [jaccard(one, other) for one, other in itertools.combinations(sets, 2)]
    mean, spread = mean_and_spread([geometric_mean(list(cell["ratio"].values())) for cell in found])
    return {
        "mean": mean, "spread": spread,
        "texts": {text: mean_and_spread([cell["ratio"][text] for cell in found]) for text in TEXTS},
        "overlap_of_seeds": mean_and_spread(pairs)[0] if pairs else None,
        "overlap_with_standard": mean_and_spread([jaccard(a, b) for a, b in zip(sets, others, strict=True)])[0],
    }  # fmt: skip


def figures(summary: Values) -> Figures:
    drawn = []
    for factor, place, label in (("samples", 0, "samples"), ("length", 1, "tokens of a sample")):
        names = sorted(summary["factors"][factor], key=lambda name: float(summary["values"][name][place]))
        at = [float(summary["values"][name][place]) for name in names]
        series = {model: (at, [summary["models"][model][name]["mean"] for name in names]) for model in MODELS}
        drawn.append(lines(f"calibration-{factor}", series, x=label, y="perplexity / dense", log="x", ticks=True))
    return drawn
