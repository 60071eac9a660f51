"""Our method and published ones on real models, at the same number of parameters: cut only and reconstructed."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from harness.charts import Line, lines
from harness.digests import PRUNING, code_name
from harness.experiment import Cells, Figures, Measured, Names, Request, Values
from harness.store import read_json
from lab.commands import TEST, flags_from, in_own_process, run_here
from lab.dense import source_of

from experiments.quality.models import GEMMA, LARGE, QWEN, SMOLLM2
from saap.reporting.figures import Figure

OURS = "saap"
LLM_PRUNER = "llm-pruner-element2@ffn"
BASELINES = (LLM_PRUNER, "flap", "wanda-sp@ffn", "block-influence")
"""LLM-Pruner and Wanda-sp prune FFN channels alone, where they are better at usual ratios."""
MORE_BASELINES = ("llm-pruner-element1@ffn", "llm-pruner-element2")
"""Measured without reconstruction only; the second one prunes attention too."""
CUT, RESTORED = "cut", "restored"
RATIOS = ("0.2", "0.1", "0.3", "0.5")
MODELS: Mapping[str, Mapping[str, Sequence[str]]] = {
    SMOLLM2: {CUT: RATIOS, RESTORED: RATIOS},
    GEMMA: {CUT: RATIOS, RESTORED: RATIOS},
    QWEN: {CUT: RATIOS, RESTORED: RATIOS},
    LARGE: {CUT: RATIOS[:1]},
}
"""Pruning ratios of each model and state."""
STRONGEST: Mapping[str, Sequence[str]] = {
    SMOLLM2: (LLM_PRUNER,),
    GEMMA: (LLM_PRUNER, "wanda-sp@ffn"),
    QWEN: (LLM_PRUNER, "flap"),
}
"""Baselines within 5 % of the best one at the first ratio with our reconstruction: only they have it at the others."""
FIRST_SEED, SEEDS = "0", ("1", "2")
"""More draws of the calibration samples for ours and LLM-Pruner at the first ratio, reconstructed: the closest pair."""
SETTINGS = {
    "samples": 50, "sample length": 256, "refit tokens": 36_864, "effort": "default", "measured on": TEST,
    "measured tokens": 8192, "window": 512,
}  # fmt: skip
SMOKE = False
PARTIAL = True
DECIDED_BY = (*PRUNING, "baselines", "pipeline/compare")


class Place(NamedTuple):
    """Where a cell stands. ratio: share of the blocks' parameters to remove. state: CUT or RESTORED."""

    model: str
    method: str
    ratio: str
    state: str
    seed: str = FIRST_SEED

    @classmethod
    def of(cls, cell: str) -> "Place":
        return cls(*cell.split("/"))

    @property
    def cell(self) -> str:
        """Its name, without the first seed."""
        return "/".join(self[:-1] if self.seed == FIRST_SEED else self)


def baselines_of(model: str, ratio: str, state: str) -> tuple[str, ...]:
    """Baselines that are measured there, and without which ours is not said to be ahead."""
    if state == CUT:
        return *BASELINES, *MORE_BASELINES
    return BASELINES if ratio == RATIOS[0] else tuple(STRONGEST[model])


def cells(request: Request) -> Names:
    places = [
        Place(model, method, ratio, state)
        for model, states in MODELS.items()
        for state, ratios in states.items()
        for ratio in ratios
        for method in (OURS, *baselines_of(model, ratio, state))
    ]
    closest = itertools.product(STRONGEST, (OURS, LLM_PRUNER), RATIOS[:1], [RESTORED], SEEDS)
    return [place.cell for place in (*places, *itertools.starmap(Place, closest))]


def measure(request: Request, wanted: Names) -> Measured:
    """One `saap compare` for the methods of a model that lack the same ratios.

    Its finished rows stay in its folder, which is of the present code alone.
    """
    code = code_name(DECIDED_BY)
    for (model, state, seed), methods in missing(wanted).items():
        folder = request.work.resolve() / f"compare-{model}-{code}"
        source, flags = source_of(request, model), flags_from(request.settings)
        flags += ["--restore", "yes" if state == RESTORED else "no", "--seeds", seed]
        for ratios in dict.fromkeys(methods.values()):
            named = [method for method, lacking in methods.items() if lacking == ratios]
            own = ["--methods", ",".join(named), "--pruning-ratio", ",".join(ratios)]
            in_own_process(run_here, ["compare", source, "--out", str(folder), *own, *flags])
            for method, ratio in itertools.product(named, ratios):
                row = read_json(folder / "rows" / f"{method.replace('@', '_')}-{ratio}-{state}-seed{seed}.json")
                yield Place(model, method, ratio, state, seed).cell, _values(row)


def missing(wanted: Names) -> dict[tuple[str, str, str], dict[str, tuple[str, ...]]]:
    """By model, state and seed, the ratios that each method lacks."""
    found: dict[tuple[str, str, str], dict[str, tuple[str, ...]]] = {}
    for model, method, ratio, state, seed in map(Place.of, wanted):
        methods = found.setdefault((model, state, seed), {})
        methods[method] = (*methods.get(method, ()), ratio)
    return found


def _values(row: Values) -> Values:
    return {
        "ratio": row["ratios"][TEST], "removed": row["pruning_ratio"], "parameters": row["parameters"],
        "seconds": row["seconds"], "peak_resident_bytes": row["peak_resident_bytes"],
    }  # fmt: skip


def summarise(found: Cells) -> Values:
    rows = {place: cell["ratio"] for place, cell in of_first_seed(found).items()}
    return {
        "tables": list(_tables(rows)), "against": list(_against(rows)), "ratios": sorted(RATIOS),
        "seeds": _by_seed(found), "ratio": float(RATIOS[0]),
    }  # fmt: skip


def of_first_seed(found: Cells) -> dict[Place, Values]:
    """By place, the cells that are compared over ratios."""
    places = {Place.of(name): cell for name, cell in found.items()}
    return {place: cell for place, cell in places.items() if place.seed == FIRST_SEED}


def _by_seed(found: Cells) -> dict[str, list[float]]:
    """By model, our perplexity over that of LLM-Pruner at the first ratio, reconstructed, with each measured seed."""
    quotients: dict[str, list[float]] = {}
    for model, seed in itertools.product(STRONGEST, (FIRST_SEED, *SEEDS)):
        pair = [Place(model, method, RATIOS[0], RESTORED, seed).cell for method in (OURS, LLM_PRUNER)]
        if all(cell in found for cell in pair):
            ours, theirs = (found[cell]["ratio"] for cell in pair)
            quotients.setdefault(model, []).append(ours / theirs)
    return {model: each for model, each in quotients.items() if len(each) > 1}


def _tables(rows: Mapping[Place, float]) -> Iterator[Values]:
    """For each model and state, the perplexities by method and ratio."""
    for model, state in dict.fromkeys((place.model, place.state) for place in rows):
        here = {place: value for place, value in rows.items() if (place.model, place.state) == (model, state)}
        methods = dict.fromkeys(place.method for place in here)
        table = {
            method: {ratio: here.get(Place(model, method, ratio, state)) for ratio in RATIOS} for method in methods
        }
        yield {"model": model, "restored": state == RESTORED, "rows": table}


def _against(rows: Mapping[Place, float]) -> Iterator[Values]:
    """Our perplexity over that of the best baseline, wherever both are measured: like with like, and ours as it is."""
    sides = {
        "cut only": (CUT, CUT),
        "with our reconstruction": (RESTORED, RESTORED),
        "baselines cut only": (RESTORED, CUT),
    }
    for model in dict.fromkeys(place.model for place in rows):
        for side, (ours, theirs) in sides.items():
            for ratio in sorted(RATIOS):
                mine = rows.get(Place(model, OURS, ratio, ours))
                baselines = {
                    place.method: value
                    for place, value in rows.items()
                    if (place.model, place.ratio, place.state) == (model, ratio, theirs) and place.method != OURS
                }
                if mine is not None and set(baselines_of(model, ratio, theirs)) <= baselines.keys():
                    best = min(baselines, key=lambda method: baselines[method])
                    yield {
                        "model": model, "side": side, "ratio": float(ratio), "ours": mine, "best": best,
                        "theirs": baselines[best], "quotient": mine / baselines[best],
                    }  # fmt: skip


def figures(summary: Values) -> Figures:
    """Perplexity by ratio, for each model and state."""
    return [_by_ratio(table) for table in summary["tables"]]


def _by_ratio(table: Values) -> Figure:
    series: dict[str, Line] = {}
    for method, found in table["rows"].items():
        measured = [ratio for ratio in sorted(RATIOS) if found[ratio] is not None]
        series[method] = [100 * float(ratio) for ratio in measured], [found[ratio] for ratio in measured]
    name = f"comparison-{table['model']}-{RESTORED if table['restored'] else CUT}"
    return lines(name, series, x="% of the decoder blocks removed", y="perplexity / dense", log="y")
