"""Multilingual: what calibrating on one language costs the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.charts import bars
from harness.experiment import Cells, Experiment, Measured, Request, Values
from lab.commands import made_by_saap
from lab.dense import Dense, draw, first_tokens, masked_perplexity, multilingual_model, open_dense, plan_for
from lab.measures import geometric_mean
from lab.texts import DATA
from lab.training import trained_folder
from torch import nn

from saap.core.records import IntArray
from saap.data.placement import SampleRequest
from saap.estimation.estimate import estimate
from saap.estimation.fusion import fuse
from saap.models.loading.devices import quick_float32_products
from saap.models.walk.backend import Backend
from saap.pipeline.shared.inputs import RunOptions, open_model
from saap.reporting.figures import Figure
from saap.settings.prune import FusionScope

LANGUAGES = {"eng": "English", "fra": "French", "deu": "German", "spa": "Spanish", "zho": "Chinese"}
FLORES = DATA / "flores200"
ENGLISH, MIX = "eng", "mix"
STATES = {"cut": "selection only", "restored": "restored"}
RATIO = 0.2


def settings(request: Request) -> Values:
    quick = request.quick
    return {
        "model": "LLaMA shape, trained here" if quick else "gemma-3-270m",
        "text": "FLORES-200 devtest", "pruning ratio": RATIO,
        "languages": list(LANGUAGES)[: 2 if quick else None],
        "samples": 4 if quick else 40, "sample length": 32 if quick else 128,
        "refit tokens": 2048 if quick else 4096, "measured tokens": 256 if quick else 4096, "window": 512,
        "effort": "fast", "seed": 0,
    }  # fmt: skip


def cells(request: Request) -> Sequence[str]:
    return [f"{state}-{calibration}" for calibration in (*settings(request)["languages"], MIX) for state in STATES]


def model_of(request: Request) -> str:
    """A trial takes a small model that was trained here: it prunes once per language."""
    return str(trained_folder(request, "llama")) if request.quick else multilingual_model(request)


def files_of(calibration: str, languages: Sequence[str]) -> list[str]:
    """The texts of a calibration, named from the root; `mix` has an equal part of every language."""
    chosen = languages if calibration == MIX else [calibration]
    return [f"benchmarks/data/flores200/{language}.calibration.txt.gz" for language in chosen]


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    chosen = settings(request)
    dense = open_dense(model_of(request))
    texts = {
        language: first_tokens(dense, FLORES / f"{language}.evaluation.txt.gz", chosen["measured tokens"])
        for language in chosen["languages"]
    }
    with quick_float32_products():
        whole = {language: dense.perplexity(ids) for language, ids in texts.items()}
        for cell in wanted:
            state, _, calibration = cell.partition("-")
            if state == "cut":
                found = _cut(dense, texts, calibration, chosen)
            else:
                found = _restored(request, dense, texts, calibration, chosen)
            yield cell, {"dense": whole, "ratio": {name: value / whole[name] for name, value in found.items()}}


def _cut(dense: Dense, texts: Mapping[str, IntArray], calibration: str, chosen: Values) -> dict[str, float]:
    request = SampleRequest("scored", chosen["samples"], chosen["sample length"])
    samples = draw(dense, files_of(calibration, list(texts)), [request], chosen["seed"])["scored"]
    scores = estimate(Backend(dense.model, dense.graph), samples)
    plan = plan_for(dense, fuse(scores, dense.graph, FusionScope.LAYER_ROLE), RATIO)
    return {language: masked_perplexity(dense, plan, ids) for language, ids in texts.items()}


def _restored(
    request: Request, dense: Dense, texts: Mapping[str, IntArray], calibration: str, chosen: Values
) -> dict[str, float]:
    """As a user gets it: `saap prune`, which also decides how much each layer gives, and restores."""
    model = model_of(request)
    arguments = [
        "prune", model, "--pruning-ratio", str(RATIO), "--effort", chosen["effort"],
        "--samples", str(chosen["samples"]), "--sample-length", str(chosen["sample length"]),
        "--refit-tokens", str(chosen["refit tokens"]),
    ]  # fmt: skip
    for file in files_of(calibration, list(texts)):
        arguments += ["--calibration", file]
    name = f"multilingual-{'trial' if request.quick else 'pruned'}-{calibration}"
    pruned: nn.Module = open_model(str(made_by_saap(request, name, arguments)), RunOptions(device="cpu")).model
    return {language: dense.perplexity(ids, pruned) for language, ids in texts.items()}


def summarise(cells: Cells) -> dict[str, Any]:
    dense = dict(cells[f"cut-{ENGLISH}"]["dense"])
    table = {
        state: {calibration: dict(cells[f"{state}-{calibration}"]["ratio"]) for calibration in (*dense, MIX)}
        for state in STATES
    }
    others = [language for language in dense if language != ENGLISH]
    states = {}
    for state, rows in table.items():
        english, mix = rows[ENGLISH], rows[MIX]
        states[state] = {
            "english_on_english": english[ENGLISH],
            "english_on_others": geometric_mean([english[language] for language in others]),
            "own_on_others": geometric_mean([rows[language][language] for language in others]),
            "mix_on_english": mix[ENGLISH],
            "mix_on_others": geometric_mean([mix[language] for language in others]),
            "mean": {name: geometric_mean(list(row.values())) for name, row in rows.items()},
        }
    worst = max(others, key=lambda language: table["restored"][ENGLISH][language])
    return {
        "dense": dense,
        "table": table,
        "states": states,
        "languages": {language: LANGUAGES[language] for language in dense},
        "names": STATES,
        "worst": {"language": LANGUAGES[worst], "ratio": table["restored"][ENGLISH][worst]},
        "seeds": [0],
    }


def figures(summary: Values) -> Sequence[Figure]:
    rows = summary["table"]["restored"]
    languages = summary["languages"]
    named = {**languages, MIX: "all of them"}
    values = {named[calibration]: [row[language] for language in languages] for calibration, row in rows.items()}
    figure = bars(
        "multilingual", "Perplexity by language and calibration, restored",
        "Perplexity of the pruned over that of the dense model in each language, by the language of the calibration.",
        values, list(languages.values()), x="perplexity / dense",
    )  # fmt: skip
    return (figure,)


EXPERIMENT = Experiment(
    name="multilingual", cells=cells, settings=settings, measure=measure, summarise=summarise, figures=figures
)
