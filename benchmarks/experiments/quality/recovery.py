"""What kinds of tuning win back of the pruned model with the same number of tokens: perplexity, answers, facts."""

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from harness.charts import bars
from harness.digests import MAKING
from harness.experiment import Cells, Figures, Measured, Names, Request, Scaled, Values
from lab.commands import pruned_folder, timed_saap
from lab.dense import model_in
from lab.texts import INSTRUCTIONS, perplexities, texts
from scipy.optimize import least_squares

from saap.core.manifest import read_manifest
from saap.evaluation.generation import BUNDLED, cloze, generation_figures, read_prompts, write
from saap.models.loading.devices import quick_float32_products
from saap.pipeline.recover.forecast import LAWS
from saap.pipeline.shared.inputs import RunOptions, open_model
from saap.settings.recover import Tuning

UNREAD = "novel"
"""The text of whose kind `OTHER_TEXTS` has nothing."""
OTHER_TEXTS = ["--data", "encyclopaedia", "--data", "conversations", "--data", "speeches"]
FULL = ["--tuning", "full"]
ON_POLICY = 0.3
LONG = "full, 20 minutes"
"""As many tokens as 20 minutes of two cores read."""
TUNED: Mapping[str, list[list[str]]] = {
    "groupwise": [["--tuning", "groupwise"]],
    "lora": [["--tuning", "lora"]],
    "full": [FULL],
    "full, on-policy": [[*FULL, "--on-policy", str(ON_POLICY)]],
    "full, then groupwise": [FULL, ["--tuning", "groupwise"]],
    "full, without novels": [[*FULL, *OTHER_TEXTS]],
    LONG: [FULL],
}
"""The flags of each run of `saap recover`, which share the tokens equally."""
MAIN = ("groupwise", "full", LONG)
CELLS = ["dense", "pruned", *MAIN]
EXTRA = [name for name in TUNED if name not in MAIN]
OPTIONS = INSTRUCTIONS
SETTINGS = {
    "model": "{model}", "preset": "fast", "tokens": Scaled(128, 80_000), "tokens of 20 minutes": Scaled(256, 180_000),
    "measured tokens": Scaled(512, 4096), "prompts": BUNDLED, "written tokens": Scaled(8, 128),
    "open prompts": Scaled(1, 12), "facts": Scaled(2, 32), "pruning ratio": 0.2,
    "tunings": [f"{name}: {' then '.join(' '.join(flags) for flags in runs)}" for name, runs in TUNED.items()],
}  # fmt: skip
DECIDED_BY = MAKING


def measure(request: Request, wanted: Names) -> Measured:
    """Tune the pruned model in each way, with the dense model as teacher; nothing that is tuned is kept."""
    preset = request.settings["preset"]
    pruned = pruned_folder(request, "--preset", preset, name=preset)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def made(state: str) -> tuple[Path, Values]:
            return tuned(request, pruned, state, folder) if state in TUNED else (pruned, {})

        yield from measured_states(request, wanted, made)


def measured_states(request: Request, wanted: Names, made: Callable[[str], tuple[Path, Values]]) -> Measured:
    """Perplexities and answers of each state. made: its folder and what it cost, except for the dense model."""
    settings = request.settings
    dense = open_model(request.model, RunOptions(device="cpu"))
    with tempfile.TemporaryDirectory() as temporary:
        named = texts(request.given, Path(temporary))
        for state in wanted:
            model, found = (Path(request.model), {}) if state == "dense" else made(state)
            measured = perplexities(model, named, most=settings["measured tokens"])
            yield state, {**found, "perplexity": measured, **answers(model_in(model), dense, settings)}


def tuned(request: Request, pruned: Path, state: str, folder: Path) -> tuple[Path, Values]:
    """The tuned folder, what it cost, and by tokens of the last run the share of the held-out gap that is closed."""
    tokens, seconds, model, curve = 0, 0.0, pruned, list[tuple[int, float]]()
    most = request.settings["tokens of 20 minutes" if state == LONG else "tokens"]
    for number, flags in enumerate(TUNED[state], start=1):
        limits = ["--max-tokens", most // len(TUNED[state])]
        limits += request.size(["--max-seq-length", 64, "--validation-samples", 1], [])
        out = folder / f"{state}-{number}"
        report, _, used = timed_saap("recover", model, "--dense", request.model, *flags, *limits, "--out", out)
        tokens, seconds, model = tokens + report["tokens"], seconds + used, out
        curve = curve_of(out)
    return model, {"tokens": tokens, "processor_seconds": seconds, "curve": curve}


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
    common = gap_closed(cells, TUNED)
    general = common["closed_mean"]
    best = max((state for state in ("groupwise", "lora", "full") if state in general), key=lambda state: general[state])
    ends = [
        cells[state]["curve"][-1] for state in ("full", LONG)
    ]  # on the way the learning rate is too high to compare
    return {
        **common, "best": best, "unread": UNREAD, "on_policy": ON_POLICY, "long": LONG,
        "ends": ends, "law": fitted(ends), "forecast": LAWS[Tuning.FULL], "tokens": cells["full"]["tokens"],
    }  # fmt: skip


def gap_closed(cells: Cells, tuned: Iterable[str]) -> dict[str, Any]:
    """The measured states, and the share of the gap that the tuned ones close, by text and on average."""
    states = [state for state in ("dense", "pruned", *tuned) if state in cells]
    logs = {state: {name: math.log(value) for name, value in cells[state]["perplexity"].items()} for state in states}
    found = {state: closed(logs, state) for state in states[2:]}
    return {
        "states": {state: cells[state] for state in states}, "closed": found,
        "closed_mean": {state: sum(one.values()) / len(one) for state, one in found.items()},
        "texts": list(cells["dense"]["perplexity"]),
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
