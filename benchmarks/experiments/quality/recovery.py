"""What kinds of tuning win back of the pruned model with the same number of tokens: perplexity, answers, facts."""

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness.charts import bars
from harness.digests import MAKING
from harness.experiment import Cells, Figures, Measured, Names, Request, Scaled, Values
from harness.store import write_json
from lab.commands import VALIDATION, pruned_folder, timed_saap
from lab.dense import model_in
from lab.texts import INSTRUCTIONS, RECORDS, perplexities, texts
from scipy.optimize import least_squares

from saap.core.manifest import read_manifest
from saap.evaluation.generation import BUNDLED, cloze, generation_figures, read_prompts, write
from saap.models.loading.devices import quick_float32_products
from saap.pipeline.recover.forecast import LAWS
from saap.pipeline.shared.inputs import RunOptions, open_model
from saap.settings.recover import Tuning

UNREAD = "novel"
"""The text of whose kind `OWN` has nothing."""
OWN = "full, own data"
FOUR_BITS = "full, own data, then groupwise"
LONG = "full, 20 minutes"
"""As many tokens as 20 minutes of two cores read."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A run of `saap recover`. flags: of it. tokens: the setting that limits them. start: state that it begins from.

    own: whether the data is as a user gives it: texts of the kinds that are measured, but none like `UNREAD`.
    """

    flags: Sequence[str]
    tokens: str = "tokens"
    start: str = "pruned"
    own: bool = False


GROUPWISE, FULL = ("--tuning", "groupwise"), ("--tuning", "full")
TUNED: Mapping[str, Tuned] = {
    "groupwise": Tuned(flags=GROUPWISE),
    "lora": Tuned(flags=("--tuning", "lora")),
    "full": Tuned(flags=FULL),
    LONG: Tuned(flags=FULL, tokens="tokens of 20 minutes"),
    OWN: Tuned(flags=FULL, tokens="tokens of own data", own=True),
    FOUR_BITS: Tuned(flags=GROUPWISE, tokens="tokens in 4 bits", start=OWN, own=True),
    "full, own data, then on-policy": Tuned(
        flags=(*FULL, "--on-policy", "1"), tokens="tokens in 4 bits", start=OWN, own=True
    ),
}
MAIN = ("groupwise", "full", LONG, OWN, FOUR_BITS)
CELLS = ["dense", "pruned", *MAIN]
EXTRA = [name for name in TUNED if name not in MAIN]
OPTIONS = INSTRUCTIONS
SETTINGS = {
    "model": "{model}", "preset": "default", "tokens": Scaled(128, 80_000),
    "tokens of 20 minutes": Scaled(256, 240_000), "tokens of own data": Scaled(256, 200_000),
    "tokens in 4 bits": Scaled(128, 40_000), "own records": 1000,
    "measured tokens": Scaled(512, 4096), "prompts": BUNDLED, "written tokens": Scaled(8, 128),
    "open prompts": Scaled(1, 12), "facts": Scaled(2, 32), "pruning ratio": 0.2,
    "tunings": [f"{name}: {' '.join(run.flags)}, from {run.start}" for name, run in TUNED.items()],
}  # fmt: skip
DECIDED_BY = MAKING


def measure(request: Request, wanted: Names) -> Measured:
    """Tune the pruned model in each way, with the dense model as teacher; tuned models are kept in the work folder."""
    settings = request.settings
    dense = open_model(request.model, RunOptions(device="cpu"))
    with tempfile.TemporaryDirectory() as temporary:
        named = texts(request.given, Path(temporary))
        for state in wanted:
            model, found = (Path(request.model), {}) if state == "dense" else made(request, state)
            measured = perplexities(model, named, most=settings["measured tokens"])
            yield state, {**found, "perplexity": measured, **answers(model_in(model), dense, settings)}


def made(request: Request, state: str) -> tuple[Path, Values]:
    """The folder of a state, and what the tuning cost, if it is tuned; made with what it begins from, if missing."""
    if state == "pruned":
        preset = request.settings["preset"]
        return pruned_folder(request, "--preset", preset, name=preset), {}
    run = TUNED[state]
    start, _ = made(request, run.start)
    out = request.work.resolve() / f"recovered-{state.replace(', ', '-').replace(' ', '-')}"
    known = out.with_suffix(".json")
    if not known.is_file():
        flags = [*run.flags, "--max-tokens", request.settings[run.tokens], *(own_data(request) if run.own else ())]
        flags += request.size(["--max-seq-length", 64, "--validation-samples", 1], [])
        report, _, used = timed_saap("recover", start, "--dense", request.model, *flags, "--out", out)
        write_json(known, {"tokens": report["tokens"], "processor_seconds": used, "curve": curve_of(out)})
    return out, json.loads(known.read_text())


def own_data(request: Request) -> list[str]:
    """Flags of texts like those that are measured: another split of WikiText-2, speeches, and other instructions."""
    found = ["--data", VALIDATION, "--data", "speeches"]
    if "instructions" not in request.given:
        return found
    file = request.work.resolve() / "own-instructions.jsonl"
    rows = Path(request.given["instructions"]).read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(rows[RECORDS : RECORDS + request.settings["own records"]]), encoding="utf-8")
    return [*found, "--data", str(file)]


def curve_of(tuned_model: Path) -> list[tuple[int, float]]:
    """Tokens and share of the gap closed on the held-out text, at each validation."""
    manifest = read_manifest(tuned_model)
    record = None if manifest is None else manifest.recovery
    if record is None or record.validation_teacher is None:
        raise RuntimeError(f"{tuned_model} was not tuned with a teacher")
    before, gap = record.validation_before, record.validation_before - record.validation_teacher
    points = [(point.tokens, point.validation) for point in record.curve if point.validation is not None]
    return [(tokens, (before - value) / gap) for tokens, value in points]


def answers(model: Any, dense: Any, settings: Values) -> Values:
    """Repetition of greedy answers to the open prompts, and the share of the bundled facts that are known."""
    prompts = read_prompts(BUNDLED)
    opens = [one.prompt for one in prompts if one.answer is None][: settings["open prompts"]]
    facts = [one for one in prompts if one.answer is not None][: settings["facts"]]
    with quick_float32_products():
        written = write(model, dense.tokenizer, opens, tokens=settings["written tokens"], sampled=False)
        known = cloze(model, dense.tokenizer, facts)
        figures = generation_figures(written, dense.model, dense.tokenizer).model_dump(mode="json")
    return {"answers": figures, "facts": known.accuracy if known is not None else None, "example": written[0].text}


def summarise(cells: Cells) -> Values:
    states = [state for state in ("dense", "pruned", *TUNED) if state in cells]
    logs = {state: {name: math.log(value) for name, value in cells[state]["perplexity"].items()} for state in states}
    shares = {state: closed(logs, state) for state in TUNED if state in cells}
    general = {state: sum(each.values()) / len(each) for state, each in shares.items()}
    best = max((state for state in ("groupwise", "lora", "full") if state in general), key=lambda state: general[state])
    ends = [
        cells[state]["curve"][-1] for state in ("full", LONG)
    ]  # on the way the learning rate is too high to compare
    return {
        "states": {state: cells[state] for state in states}, "closed": shares, "closed_mean": general, "best": best,
        "unread": UNREAD, "long": LONG, "own": OWN,
        "ends": ends, "law": fitted(ends), "forecast": LAWS[Tuning.FULL],
        "tokens": cells["full"]["tokens"], "texts": list(cells["dense"]["perplexity"]),
    }  # fmt: skip


def fitted(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Scale and exponent of `saap.pipeline.recover.forecast.share_after` nearest to tokens and their shares."""
    tokens, shares = map(np.array, zip(*points, strict=True))
    start = LAWS[Tuning.FULL]
    found = least_squares(lambda law: 1 - (1 + tokens / law[0]) ** -law[1] - shares, start, x_scale=start)
    return float(found.x[0]), float(found.x[1])


def closed(logs: Mapping[str, Mapping[str, float]], state: str) -> dict[str, float]:
    """Share of the gap in log-perplexity between the pruned and the dense model that is closed, by text."""
    dense, pruned = logs["dense"], logs["pruned"]
    return {name: (pruned[name] - value) / (pruned[name] - dense[name]) for name, value in logs[state].items()}


def figures(summary: Values) -> Figures:
    values = {state: list(each.values()) for state, each in summary["closed"].items()}
    return [bars("recovery", values, summary["texts"], x="share of the gap closed")]
