"""Perplexity after pruning: our default, the literal readings, every baseline, several ratios."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from resultsbook.charts import bars, lines
from resultsbook.models import RANKED_BEFORE
from resultsbook.row import Cells, Row, Source, Values
from saap.reporting.figures import Figure

TEST = "benchmarks/data/wikitext2/test.jsonl.gz"
RATIO_ROWS = {"10": "default-wikitext2-10", "20": "default-wikitext2", "30": "default-wikitext2-30",
              "50": "default-wikitext2-50"}  # fmt: skip
RUNS = (
    *RATIO_ROWS.values(),
    "default-wikitext2-uniform",
    "best-wikitext2",
    "fast-wikitext2",
    "default-mixed",
    "fast-mixed",
)
TEXTS = ("wikitext2", "novel", "addresses", "instructions")


def summarise(cells: Cells) -> dict[str, Any]:
    runs = [
        {
            "name": name,
            "command": cells[name]["command"],
            "removed": cells[name]["pruning_ratio"],
            "ratio": {text: cells[name]["ratio"].get(text) for text in TEXTS},
        }
        for name in RUNS
    ]
    by_name = {run["name"]: run for run in runs}
    compared = [
        {
            "method": row["method"],
            "restored": row["restored"],
            "removed": row["pruning_ratio"],
            "ratio": row["ratios"][TEST],
        }
        for row in cells["compare"]["rows"]
        if row["ratio"] == 0.2
    ]
    ours = {row["restored"]: row["ratio"] for row in compared if row["method"] == "saap"}
    theirs = {
        restored: min((r for r in compared if r["method"] != "saap" and r["restored"] is restored), key=_ratio)
        for restored in (False, True)
    }
    literal = [row for row in cells["selection"]["rows"] if row["strategy"].startswith("volatility")]
    return {
        "by_ratio": {asked: by_name[name] for asked, name in RATIO_ROWS.items()},
        "runs": runs,
        "default": by_name["default-wikitext2"],
        "mixed": by_name["default-mixed"],
        "compared": compared,
        "ours_restored": ours[True],
        "ours_cut": ours[False],
        "best_baseline_restored": theirs[True],
        "best_baseline_cut": theirs[False],
        "quotient_restored": ours[True] / theirs[True]["ratio"],
        "quotient_cut": ours[False] / theirs[False]["ratio"],
        "same_plan": next((row["method"] for row in compared if _is_ours(row, ours[False])), None),
        "selection": cells["selection"]["rows"],
        "literal_best_restored": min(row["ratio_with_restoration"] for row in literal),
        "literal_best_cut": min(row["ratio_without_restoration"] for row in literal),
        "seeds": [0],
    }


def _is_ours(row: Values, ours: float) -> bool:
    """Whether a baseline, cut only, has our perplexity to the bit: it is the same model."""
    return row["method"] != "saap" and not row["restored"] and row["ratio"] == ours


def _ratio(row: Values) -> float:
    return float(row["ratio"])


def figures(summary: Values) -> Sequence[Figure]:
    runs = list(summary["by_ratio"].values())
    by_text = {
        text: ([100 * run["removed"] for run in runs], [run["ratio"][text] for run in runs])
        for text in TEXTS
        if all(run["ratio"][text] is not None for run in runs)
    }
    found = {(row["method"], row["restored"]): row["ratio"] for row in summary["compared"]}
    both = [method for method, restored in found if not restored and (method, True) in found]
    methods = list(dict.fromkeys(both))
    return (
        lines(
            "perplexity-by-ratio", "Perplexity against what is removed",
            "Perplexity of the pruned over that of the dense model against the share that is removed, by text.",
            by_text, x="% of the decoder blocks removed", y="perplexity / dense", log="y",
        ),
        bars(
            "perplexity-by-method", "Methods at the same number of parameters",
            "Perplexity of the pruned over that of the dense model by method, of those measured cut only and restored.",
            {
                label: [found[method, restored] for method in methods]
                for label, restored in (("cut only", False), ("restored", True))
            },
            methods, x="perplexity / dense, WikiText-2 test",
        ),
    )  # fmt: skip


ROW = Row(
    name="perplexity",
    title="Perplexity after pruning",
    question="How much perplexity does pruning cost without any training, beside published methods?",
    summarise=summarise,
    figures=figures,
    sources={
        **{name: Source(file=f"{name}.json", command=f"python benchmarks/prune.py {name}") for name in RUNS},
        "selection": Source(file="selection.json", command="python benchmarks/selection.py"),
        "compare": Source(
            file="compare/comparison.json", command="python benchmarks/compare.py --passes main --ratios 0.2"
        ),
    },
    limits="One model of 135 million parameters and one seed. The tables have protocols of their own: calibration "
    "text, refit tokens and measured tokens differ between them, so figures are compared inside a table only. "
    "Of the comparison and of all rows but default-mixed and fast-mixed: " + RANKED_BEFORE,
)
