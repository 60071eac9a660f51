"""Which units go: single importances and literal strategies, cut only and reconstructed, on several models."""

from itertools import product
from typing import Any

from harness.experiment import Cells, Measured, Names, Request, Scaled, Values
from lab.dense import Dense, Ratios, Units, opened, source_of
from lab.measures import geometric_mean
from lab.texts import TEXTS

from experiments.quality.models import GEMMA, QWEN, SMOLLM2
from saap.core.records import ImportanceScores, Role
from saap.data.texts import MIXED
from saap.estimation.estimate import estimate, unit_scores
from saap.settings.prune import FusionScope
from saap.settings.registry import Importance, Strategy
from saap.surgery.reconstruct import ReconstructionSettings

MODELS = (SMOLLM2, GEMMA, QWEN)
DEFAULT = Importance.TOKEN_FISHER
IMPORTANCES = (
    DEFAULT, Importance.FUSED, Importance.VECTOR, Importance.ELEMENT1, Importance.ELEMENT2, Importance.MIXED,
)  # fmt: skip
LITERAL = (Strategy.IMPORTANCE, Strategy.STABILITY, Strategy.VOLATILITY_Z, Strategy.VOLATILITY_CV)
UNWEIGHTED = "none"
"""The choice on the pruned stream by second-order cost alone."""
RATIO = 0.2
SETTINGS = {
    "model": "{model}", "calibration": MIXED, "seed": 0, "pruning ratio": RATIO,
    "samples": Scaled(4, 50), "sample length": Scaled(32, 128),
    "refit sequences": Scaled(2, 16), "refit length": Scaled(64, 512), "measured tokens": Scaled(512, 8192),
}  # fmt: skip
PARTIAL = True


def cells(request: Request) -> Names:
    models = MODELS[:1] if request.quick else MODELS
    equal = product(models, [Strategy.UNIFORM], [*IMPORTANCES, UNWEIGHTED])
    return ["/".join(one) for one in [*equal, *product(MODELS[:1], LITERAL, [Importance.FUSED])]]


def measure(request: Request, wanted: Names) -> Measured:
    for source in dict.fromkeys(cell.partition("/")[0] for cell in wanted):
        with opened(source_of(request, source)) as dense:
            selection = Selection(dense, request.settings)
            for cell in wanted:
                model, strategy, importance = cell.split("/")
                if model == source:
                    yield cell, selection.measured(Strategy(strategy), importance)


class Selection:
    """A dense model with its texts, perplexities and scores."""

    def __init__(self, dense: Dense, chosen: Values) -> None:
        samples = dense.samples(
            chosen["calibration"], chosen["seed"], scored=(chosen["samples"], chosen["sample length"]),
            refit=(chosen["refit sequences"], chosen["refit length"]),
        )  # fmt: skip
        self._dense, self._scored, self._text = dense, samples["scored"], dense.ids(samples["refit"])
        self._ratios = Ratios(dense, chosen["measured tokens"], TEXTS)
        self._estimates: dict[Importance, ImportanceScores] = {}

    def measured(self, strategy: Strategy, importance: str) -> Values:
        """Ratios by text. cut: masked; own: with the plan's units reconstructed; chosen: on the pruned stream."""
        if importance == UNWEIGHTED:
            return {"chosen": self._restored(strategy, self._units(DEFAULT), ReconstructionSettings())}
        units = self._units(Importance(importance))
        plan = self._dense.plan(units, RATIO, strategy)
        found = {
            "cut": self._ratios.masked(plan),
            "own": self._restored(strategy, units, ReconstructionSettings(second_order=False)),
        }
        if strategy is Strategy.UNIFORM:
            scores = {name: score.mean for name, score in units.items()}
            found["chosen"] = self._restored(strategy, units, ReconstructionSettings(scores=scores))
        return found

    def _units(self, importance: Importance) -> Units:
        one = Importance.FUSED if importance is Importance.VECTOR else importance  # the same estimation has both
        if one not in self._estimates:
            self._estimates[one] = estimate(self._dense.backend, self._scored, roles=[Role.FFN], importance=one)
        return unit_scores(self._estimates[one], self._dense.graph, importance, FusionScope.LAYER_ROLE)

    def _restored(self, strategy: Strategy, units: Units, how: ReconstructionSettings) -> dict[str, float]:
        plan = self._dense.plan(units, RATIO, strategy)
        return self._ratios.of(self._dense.pruned(plan, self._text, how))


def summarise(cells: Cells) -> Values:
    tables: dict[str, dict[str, Any]] = {}
    for cell, values in cells.items():
        model, strategy, importance = cell.split("/")
        means = {state: geometric_mean([*ratios.values()]) for state, ratios in values.items()}
        tables.setdefault(model, {})[f"{strategy}, {importance}"] = means
    rows = [means for table in tables.values() for means in table.values()]
    gains = [means["own"] / means["chosen"] - 1 for means in rows if {"own", "chosen"} <= means.keys()]
    first = f"{Strategy.UNIFORM}, {DEFAULT}"
    behind = {
        model: table[first]["chosen"] / min(min(restored(means)) for means in table.values()) - 1
        for model, table in tables.items()
        if first in table
    }
    own = {name: means["own"] for name, means in tables.get(SMOLLM2, {}).items() if "own" in means}
    kinds = {"literal": [one for name, one in own.items() if name.startswith("volatility")]}
    kinds["usual"] = [one for name, one in own.items() if not name.startswith("volatility")]
    return {
        "tables": tables, "texts": list(TEXTS), "models": len(behind), "most": max(behind.values(), default=0.0),
        **{name: [min(values), max(values)] for name, values in {**kinds, "gain": gains}.items() if len(values) > 1},
    }  # fmt: skip


def restored(means: dict[str, float]) -> list[float]:
    """Those of the means after a reconstruction."""
    return [mean for state, mean in means.items() if state != "cut"]
