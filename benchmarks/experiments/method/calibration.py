"""Calibration: how many samples, how long, of what text; one factor at a time, selection only."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.charts import lines
from harness.experiment import Cells, Experiment, Measured, Request, Values
from lab.commands import VALIDATION
from lab.dense import Dense, draw, masked_perplexity, measured_text, open_dense, plan_for
from lab.measures import as_bits, from_bits, geometric_mean, jaccard, mean_and_spread
from lab.texts import TEXTS
from lab.training import trained_folder

from saap.core.records import CalibrationSet, ModelGraph, Role, StructurePlan
from saap.data.generated import random_starts, sample_from_model
from saap.data.placement import SampleRequest
from saap.data.texts import MIXED
from saap.estimation.estimate import estimate
from saap.estimation.fusion import fuse
from saap.models.loading.devices import quick_float32_products
from saap.models.walk.backend import Backend
from saap.reporting.figures import Figure
from saap.settings.prune import FusionScope

RATIO = 0.2
GENERATED, WIKITEXT2 = "generated", "wikitext2"
MODELS = {"large": "the model of the book", "small": "a LLaMA shape that the benchmark has trained"}


@dataclass(frozen=True, order=True)
class Setting:
    """One calibration: how many samples of how many tokens, of which text."""

    samples: int
    length: int
    kind: str

    @property
    def name(self) -> str:
        """Part of a cell's name."""
        return f"{self.samples}x{self.length}-{self.kind}"


def settings(request: Request) -> Values:
    quick = request.quick
    return {
        "models": [request.model, "LLaMA shape, trained here"], "pruning ratio": RATIO,
        "seeds": [0, 1] if quick else [0, 1, 2],
        "numbers of samples": [2, 4] if quick else [5, 10, 20, 30, 40, 50, 100, 200],
        "lengths": [16, 32] if quick else [64, 128, 256, 512],
        "kinds": [WIKITEXT2, "novels"] if quick else
        [WIKITEXT2, "novels", "speeches", "encyclopaedia", "conversations", MIXED, GENERATED],
        "standard": [4, 32, WIKITEXT2] if quick else [50, 128, WIKITEXT2],
        "measured tokens": 256 if quick else 2048,
    }  # fmt: skip


def factors(request: Request) -> dict[str, list[Setting]]:
    """The settings of each factor, the other two at their standard."""
    chosen = settings(request)
    samples, length, kind = chosen["standard"]
    return {
        "samples": [Setting(number, length, kind) for number in chosen["numbers of samples"]],
        "length": [Setting(samples, tokens, kind) for tokens in chosen["lengths"]],
        "kind": [Setting(samples, length, text) for text in chosen["kinds"]],
    }


def cells(request: Request) -> Sequence[str]:
    every = dict.fromkeys(itertools.chain(*factors(request).values()))
    return [
        f"{model}-{setting.name}-{seed}"
        for model in MODELS
        for seed in settings(request)["seeds"]
        for setting in sorted(every, key=lambda s: (s.kind != WIKITEXT2, s.kind, s.length, s.samples))
    ]


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    for model in MODELS:
        names = [name for name in wanted if name.startswith(f"{model}-")]
        if names:
            source = request.model if model == "large" else str(trained_folder(request, "llama"))
            with quick_float32_products():
                yield from _of_model(request, open_dense(source), names)


def _of_model(request: Request, dense: Dense, wanted: Sequence[str]) -> Measured:
    tokens = settings(request)["measured tokens"]
    texts = {name: measured_text(dense, name, tokens) for name in TEXTS}
    whole = {name: dense.perplexity(text) for name, text in texts.items()}
    drawn: dict[tuple[int, str, int], CalibrationSet] = {}
    for name in wanted:
        setting, seed = _parse(name)
        key = (setting.length, setting.kind, seed)
        if key not in drawn:
            drawn[key] = samples_of(request, dense, setting, seed)
        first = dataclasses.replace(drawn[key], tokens=drawn[key].tokens[: setting.samples])
        scores = estimate(Backend(dense.model, dense.graph), first)
        plan = plan_for(dense, fuse(scores, dense.graph, FusionScope.LAYER_ROLE), RATIO)
        ratios = {text: masked_perplexity(dense, plan, ids) / whole[text] for text, ids in texts.items()}
        yield name, {"ratio": ratios, "removed": as_bits(numbered(dense.graph, plan))}


def numbered(graph: ModelGraph, plan: StructurePlan) -> set[int]:
    """The FFN channels that are removed, numbered through all modules."""
    groups = graph.of_role(Role.FFN)
    starts = itertools.accumulate((group.units for group in groups), initial=0)
    return {
        start + unit
        for group, start in zip(groups, starts, strict=False)
        if group.name in plan.keep
        for unit in set(range(group.units)) - set(plan.keep[group.name])
    }


def _parse(cell: str) -> tuple[Setting, int]:
    _, size, *kind, seed = cell.split("-")
    samples, _, length = size.partition("x")
    return Setting(int(samples), int(length), "-".join(kind)), int(seed)


def samples_of(request: Request, dense: Dense, setting: Setting, seed: int) -> CalibrationSet:
    """As many samples as the largest setting of this text and length needs; smaller ones are their beginning."""
    every = itertools.chain(*factors(request).values())
    most = max(s.samples for s in every if (s.kind, s.length) == (setting.kind, setting.length))
    if setting.kind == GENERATED:
        starts = random_starts(dense.loaded.tokenizer, sequences=most, seed=seed)
        ids = sample_from_model(
            dense.model, sequences=most, length=setting.length, batch=25, seed=seed, starts=starts
        )  # fmt: skip
        return CalibrationSet(sources=(GENERATED,), seed=seed, tokens=ids)
    source = VALIDATION if setting.kind == WIKITEXT2 else setting.kind
    return draw(dense, source, [SampleRequest("scored", most, setting.length)], seed)["scored"]


def summarise(cells: Cells) -> dict[str, Any]:
    parsed = {name: (name.partition("-")[0], *_parse(name)) for name in cells}
    names = sorted({setting for _, setting, _ in parsed.values()})
    standard = _standard(names)
    models = {}
    for model in MODELS:
        by_setting = {
            setting: [cells[name] for name, (m, s, _) in parsed.items() if (m, s) == (model, setting)]
            for setting in names
        }
        models[model] = {s.name: _of_setting(found, by_setting[standard]) for s, found in by_setting.items() if found}
    large = models["large"]
    by_factor = {
        "samples": [s.name for s in names if (s.length, s.kind) == (standard.length, standard.kind)],
        "length": [s.name for s in names if (s.samples, s.kind) == (standard.samples, standard.kind)],
        "kind": [s.name for s in names if (s.samples, s.length) == (standard.samples, standard.length)],
    }
    spans = {
        factor: max(large[name]["mean"] for name in same) / min(large[name]["mean"] for name in same)
        for factor, same in by_factor.items()
    }
    few, many, longest = by_factor["samples"][0], by_factor["samples"][-1], by_factor["length"][-1]
    return {
        "models": models, "meaning": MODELS, "factors": by_factor, "standard": standard.name, "spans": spans,
        "mixed": next((name for name in by_factor["kind"] if name.endswith(MIXED)), standard.name),
        "values": {s.name: [s.samples, s.length, s.kind] for s in names},
        "few": {"samples": names_to_samples(few), **large[few]},
        "many": {"samples": names_to_samples(many), **large[many]},
        "longest": {"tokens": next(s.length for s in names if s.name == longest), **large[longest]},
        "standard_mean": large[standard.name]["mean"], "standard_spread": large[standard.name]["spread"],
        "widest": max(spans, key=lambda factor: spans[factor]),
        "seeds": sorted({seed for _, _, seed in parsed.values()}),
    }  # fmt: skip


def names_to_samples(name: str) -> int:
    """The number of samples in a setting's name."""
    return int(name.partition("x")[0])


def _standard(found: Sequence[Setting]) -> Setting:
    """The setting that takes part in all three factors: the most common value of each."""

    def usual(values: Sequence[Any]) -> Any:
        return max(dict.fromkeys(values), key=list(values).count)

    return Setting(usual([s.samples for s in found]), usual([s.length for s in found]), usual([s.kind for s in found]))


def _of_setting(found: Sequence[Values], standard: Sequence[Values]) -> dict[str, Any]:
    """Perplexity ratios and overlaps over the seeds of one setting. standard: the cells of the standard one."""
    texts = {text: mean_and_spread([cell["ratio"][text] for cell in found]) for text in TEXTS}
    means = [geometric_mean(list(cell["ratio"].values())) for cell in found]
    sets = [from_bits(cell["removed"]) for cell in found]
    others = [from_bits(cell["removed"]) for cell in standard]
    pairs = [jaccard(one, other) for one, other in itertools.combinations(sets, 2)]
    mean, spread = mean_and_spread(means)
    return {
        "mean": mean,
        "spread": spread,
        "texts": texts,
        "overlap_of_seeds": mean_and_spread(pairs)[0] if pairs else None,
        "overlap_with_standard": mean_and_spread([jaccard(a, b) for a, b in zip(sets, others, strict=True)])[0],
    }


def figures(summary: Values) -> Sequence[Figure]:
    drawn = []
    for factor, place, label in (("samples", 0, "samples"), ("length", 1, "tokens of a sample")):
        names = sorted(summary["factors"][factor], key=lambda name: float(summary["values"][name][place]))
        at = [float(summary["values"][name][place]) for name in names]
        series = {model: (at, [summary["models"][model][name]["mean"] for name in names]) for model in MODELS}
        drawn.append(
            lines(
                f"calibration-{factor}", f"Perplexity against {label}",
                f"Perplexity of the masked over that of the dense model, mean over three texts, against {label}.",
                series, x=label, y="perplexity / dense", log="x", ticks=True,
            )
        )  # fmt: skip
    return drawn


EXPERIMENT = Experiment(
    name="calibration", cells=cells, settings=settings, measure=measure, summarise=summarise, figures=figures
)
