"""What recovery wins back of pruned models: perplexity on text like and unlike its data, answers and facts."""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness.charts import bars
from harness.digests import MAKING
from harness.experiment import Cells, Figures, Measured, Names, Request, Scaled, Values
from lab.commands import VALIDATION, made_by_saap
from lab.dense import model_in, source_of
from lab.texts import INSTRUCTIONS, RECORDS, perplexities, texts
from scipy.optimize import least_squares

from experiments.quality.models import QWEN, SMOLLM2, code
from saap.core.manifest import read_manifest
from saap.data.texts import evaluation_text
from saap.evaluation.generation import BUNDLED, cloze, generation_figures, read_prompts, token_agreement, write
from saap.models.loading.devices import quick_float32_products
from saap.pipeline.recover.forecast import LAWS
from saap.pipeline.shared.inputs import RunOptions, open_model
from saap.settings.recover import Tuning

UNREAD = "novel"
"""The text of whose kind the own text has nothing."""
MORE = ("bundled", "code")
"""Measured besides the texts of the shares: what `saap prune` ends with, and Python code."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of `saap recover`. tokens: that it reads. own: whether its data is the user's own. start: by name."""

    flags: Sequence[str]
    tokens: Scaled
    own: bool = False
    start: str = "pruned"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A pruned model and what is run from it, by name."""

    title: str
    model: str
    ratio: float
    runs: Mapping[str, Run]


FULL = ("--tuning", "full")
EQUAL, LONG, SECOND, HALF_HOUR, HOUR = (
    Scaled(128, tokens) for tokens in (80_000, 200_000, 40_000, 72_000, 800_000)
)  # fmt: skip
OWN = "own text"
MAIN = "smollm2"
SUBJECTS: Mapping[str, Subject] = {
    MAIN: Subject(
        title="SmolLM2-135M, 20 %", model=SMOLLM2, ratio=0.2,
        runs={
            "groupwise": Run(flags=(), tokens=EQUAL),
            "lora": Run(flags=("--tuning", "lora"), tokens=EQUAL),
            "full": Run(flags=FULL, tokens=EQUAL),
            "full, 20 minutes": Run(flags=FULL, tokens=LONG),
            OWN: Run(flags=FULL, tokens=LONG, own=True),
            f"{OWN}, then groupwise": Run(flags=(), tokens=SECOND, own=True, start=OWN),
            f"{OWN}, then on-policy": Run(flags=(*FULL, "--on-policy", "1"), tokens=SECOND, own=True, start=OWN),
        },
    ),
    "smollm2-half": Subject(
        title="SmolLM2-135M, 50 %", model=SMOLLM2, ratio=0.5, runs={"full, 60 minutes": Run(flags=FULL, tokens=HOUR)}
    ),
    QWEN: Subject(
        title="Qwen2.5-Coder 0.5B, 20 %", model=QWEN, ratio=0.2,
        runs={"full, 30 minutes": Run(flags=FULL, tokens=HALF_HOUR)},
    ),
}  # fmt: skip
"""The minutes of a name are about those of two cores."""
CELLS = [f"{name}/{state}" for name, one in SUBJECTS.items() for state in ("dense", "pruned", *one.runs)]
PARTIAL = True
OPTIONS = INSTRUCTIONS
SETTINGS = {
    "instructions": 1000, "measured tokens": Scaled(512, 4096), "prompts": BUNDLED, "written tokens": Scaled(8, 128),
    "open prompts": Scaled(1, 12), "facts": Scaled(2, 32),
}  # fmt: skip
DECIDED_BY = MAKING


def measure(request: Request, wanted: Names) -> Measured:
    """Tune the pruned models, with the dense ones as teachers; all folders are kept in the work folder."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundled = folder / "bundled.txt"
        bundled.write_text(evaluation_text(), encoding="utf-8")
        named = {**texts(request.given, folder), "bundled": bundled, "code": code(folder)}
        for cell in wanted:
            name, _, state = cell.partition("/")
            subject = SUBJECTS[name]
            dense = source_of(request, subject.model)
            model = dense if state == "dense" else str(made(request, name, state))
            found = perplexities(model, named, most=request.settings["measured tokens"])
            yield cell, {**cost(model), "perplexity": found, **answers(model, dense, request.settings)}


def made(request: Request, name: str, state: str) -> Path:
    """The folder of a state, and of what it begins from, if missing."""
    subject = SUBJECTS[name]
    folder = f"{name}-{state.replace(', ', '-').replace(' ', '-')}"
    source = source_of(request, subject.model)
    if state == "pruned":
        least = request.size(["--effort", "fast", "--no-restore"], [])
        return made_by_saap(request, folder, "prune", source, "--pruning-ratio", subject.ratio, *least)
    run = subject.runs[state]
    flags = [*run.flags, "--max-tokens", request.filled(run.tokens), *(own_text(request) if run.own else [])]
    flags += request.size(["--max-seq-length", 64, "--validation-samples", 1], [])
    return made_by_saap(request, folder, "recover", made(request, name, run.start), "--dense", source, *flags)


def own_text(request: Request) -> list[str]:
    """Flags of text like what is measured: another split of WikiText-2, speeches, and other instructions."""
    found = ["--data", VALIDATION, "--data", "speeches"]
    if "instructions" not in request.given:
        return found
    file = request.work.resolve() / "instructions.jsonl"
    rows = Path(request.given["instructions"]).read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(rows[RECORDS : RECORDS + request.settings["instructions"]]), encoding="utf-8")
    return [*found, "--data", str(file)]


def cost(model: str) -> Values:
    """Tokens and seconds of the last recovery of a folder, and by tokens the held-out share of the gap it closed."""
    manifest = read_manifest(Path(model)) if Path(model).is_dir() else None
    record = None if manifest is None else manifest.recovery
    if record is None or record.validation_teacher is None:
        return {}
    before, gap = record.validation_before, record.validation_before - record.validation_teacher
    points = [(point.tokens, point.validation) for point in record.curve if point.validation is not None]
    curve = [(tokens, (before - value) / gap) for tokens, value in points]
    return {"tokens": record.tokens, "seconds_of_training": record.seconds, "curve": curve}


def answers(model: str, dense: str, settings: Values) -> Values:
    """Greedy answers to the open prompts, agreement with those of the dense model, and the bundled facts."""
    reference = open_model(dense, RunOptions(device="cpu"))
    tokenizer, pruned = reference.tokenizer, model_in(model)
    prompts = read_prompts(BUNDLED)
    opens = [one.prompt for one in prompts if one.answer is None][: settings["open prompts"]]
    facts = [one for one in prompts if one.answer is not None][: settings["facts"]]
    with quick_float32_products():
        by_dense, by_model = (
            write(one, tokenizer, opens, tokens=settings["written tokens"], sampled=False)
            for one in (reference.model, pruned)
        )
        known = cloze(pruned, tokenizer, facts)
        return {
            "answers": generation_figures(by_model, reference.model, tokenizer).model_dump(mode="json"),
            "agreement": token_agreement(pruned, by_dense, tokenizer),
            "facts": known.accuracy if known is not None else None, "example": by_model[0].text,
        }  # fmt: skip


def summarise(cells: Cells) -> Values:
    groups = list(_groups(cells))
    opens = [one.prompt for one in read_prompts(BUNDLED) if one.answer is None]
    found: dict[str, Any] = {"groups": groups, "prompt": opens[0], "unread": UNREAD, "own": OWN}
    runs, closed = SUBJECTS[MAIN].runs, {}
    if groups and groups[0]["name"] == MAIN:
        closed = groups[0]["closed"]
    equal = [state for state in closed if runs[state].tokens == EQUAL]
    if equal:
        best = max(equal, key=lambda state: float(closed[state]["mean"]))
        tokens = groups[0]["states"][best]["tokens"]
        found |= {"equal": {state: closed[state]["mean"] for state in equal}, "best": best, "tokens": tokens}
    # on the way the learning rate is too high to compare: only ends
    ends = [cells[f"{MAIN}/{state}"]["curve"][-1] for state in ("full", "full, 20 minutes") if state in closed]
    if len(ends) == 2:
        found |= {"ends": ends, "law": fitted(ends), "forecast": LAWS[Tuning.FULL]}
    return found


def _groups(cells: Cells) -> Iterator[Values]:
    """The measured states of each pruned model, with the share of the gap that the tuned ones close."""
    for name, subject in SUBJECTS.items():
        states = {state: cells[f"{name}/{state}"] for state in ("dense", "pruned", *subject.runs)
                  if f"{name}/{state}" in cells}  # fmt: skip
        if not {"dense", "pruned"} <= states.keys():
            continue
        dense, pruned = ({k: math.log(v) for k, v in states[one]["perplexity"].items()} for one in ("dense", "pruned"))
        closed = {
            state: {k: (pruned[k] - math.log(v)) / (pruned[k] - dense[k]) for k, v in one["perplexity"].items()}
            for state, one in states.items() if state in subject.runs
        }  # fmt: skip
        shares = [text for text in dense if text not in MORE]
        for one in closed.values():
            one["mean"] = sum(one[text] for text in shares) / len(shares)
        yield {
            "name": name, "title": subject.title, "ratio": subject.ratio, "states": states, "closed": closed,
            "texts": list(dense), "shares": shares,
        }  # fmt: skip


def fitted(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Scale and exponent of `saap.pipeline.recover.forecast.share_after` nearest to tokens and their shares."""
    tokens, shares = map(np.array, zip(*points, strict=True))
    start = LAWS[Tuning.FULL]
    found = least_squares(lambda law: 1 - (1 + tokens / law[0]) ** -law[1] - shares, start, x_scale=start)
    return float(found.x[0]), float(found.x[1])


def figures(summary: Values) -> Figures:
    first = next((one for one in summary["groups"] if one["closed"]), None)
    if first is None:
        return ()
    values = {state: [each[text] for text in first["texts"]] for state, each in first["closed"].items()}
    return [bars("recovery", values, first["texts"], x="share of the gap closed")]
