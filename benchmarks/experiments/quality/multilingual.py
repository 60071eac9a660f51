"""Multilingual calibration: the cost of calibrating on one language for the others."""

from harness.charts import bars
from harness.experiment import Cells, Figures, Measured, Names, Request, Scaled, Values
from lab.commands import flags_from, made_by_saap
from lab.dense import Ratios, model_in, multilingual_model, opened
from lab.measures import geometric_mean
from lab.texts import DATA
from lab.training import trained_folder

LANGUAGES = {"eng": "English", "fra": "French", "deu": "German", "spa": "Spanish", "zho": "Chinese"}
FLORES = DATA / "flores200"
ENGLISH, MIX = "eng", "mix"
STATES = {"cut": "selection only", "restored": "restored"}
RATIO = 0.2
SETTINGS = {
    "model": Scaled("LLaMA shape, trained here", "gemma-3-270m"),
    "text": "FLORES-200 devtest", "pruning ratio": RATIO,
    "languages": Scaled(list(LANGUAGES)[:2], list(LANGUAGES)),
    "samples": Scaled(4, 40), "sample length": Scaled(32, 128),
    "refit tokens": Scaled(2048, 4096), "measured tokens": Scaled(256, 4096), "window": 512,
    "effort": "fast", "seed": 0,
}  # fmt: skip


def cells(request: Request) -> Names:
    return [f"{state}-{calibration}" for calibration in (*request.settings["languages"], MIX) for state in STATES]


def measure(request: Request, wanted: Names) -> Measured:
    """Cut only, by the scores of the calibration; and the default of `saap prune`."""
    chosen = request.settings
    languages = chosen["languages"]
    # a smoke run uses a small model trained here, since it prunes once per language
    model = str(trained_folder(request, "llama")) if request.quick else multilingual_model(request)
    flags = flags_from(chosen, "measured tokens", "window")
    with opened(model) as dense:
        files = {language: FLORES / f"{language}.evaluation.txt.gz" for language in languages}
        ratios = Ratios(dense, chosen["measured tokens"], files)
        for cell in wanted:
            state, _, calibration = cell.partition("-")
            mixed = languages if calibration == MIX else [calibration]
            sources = [f"benchmarks/data/flores200/{language}.calibration.txt.gz" for language in mixed]
            if state == "cut":
                size = chosen["samples"], chosen["sample length"]
                drawn = dense.samples(sources, chosen["seed"], scored=size)["scored"]
                found = ratios.masked(dense.plan(dense.fused(drawn), RATIO))
            else:
                texts = [word for file in sources for word in ("--calibration", file)]
                name = f"multilingual-{request.size('trial', 'pruned')}-{calibration}"
                folder = made_by_saap(request, name, "prune", model, *flags, *texts)
                found = ratios.of(model_in(folder))
            yield cell, {"dense": ratios.dense, "ratio": found}


def summarise(cells: Cells) -> Values:
    dense = cells[f"cut-{ENGLISH}"]["dense"]
    others = [language for language in dense if language != ENGLISH]
    table = {
        state: {calibration: cells[f"{state}-{calibration}"]["ratio"] for calibration in (*dense, MIX)}
        for state in STATES
    }
    means = {s: {name: geometric_mean(list(row.values())) for name, row in rows.items()} for s, rows in table.items()}
    rows = table["restored"]
    restored = rows[ENGLISH]
    findings = {
        "english_on_others": geometric_mean([restored[language] for language in others]),
        "own_on_others": geometric_mean([rows[language][language] for language in others]),
        "mix_on_others": geometric_mean([rows[MIX][language] for language in others]),
    }  # fmt: skip
    worst = max(others, key=lambda language: restored[language])
    return {
        "dense": dense, "table": table, "means": means, "names": STATES, **findings,
        "languages": {language: LANGUAGES[language] for language in dense},
        "worst": {"language": LANGUAGES[worst], "ratio": restored[worst]},
    }  # fmt: skip


def figures(summary: Values) -> Figures:
    languages, rows = summary["languages"], summary["table"]["restored"]
    named = {**languages, MIX: "all of them"}
    values = {named[calibration]: [row[language] for language in languages] for calibration, row in rows.items()}
    return [bars("multilingual", values, list(languages.values()), x="perplexity / dense")]
