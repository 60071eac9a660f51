"""What recovery wins back with text of the user's own, from the default: in full precision, then in 4 bits."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness.charts import bars
from harness.digests import MAKING
from harness.experiment import Cells, Figures, Measured, Names, Request, Scaled, Values
from harness.store import write_json
from lab.commands import VALIDATION, pruned_folder, timed_saap
from lab.texts import INSTRUCTIONS, RECORDS

from experiments.quality.recovery import curve_of, gap_closed, measured_states
from saap.evaluation.generation import BUNDLED

UNREAD = "novel"
"""The text of whose kind the data has nothing."""
FULL = "full"


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """A run of `saap recover`. flags: of it. tokens: the setting that limits them. start: state that it begins from."""

    flags: Sequence[str]
    tokens: str
    start: str = "pruned"


TUNED: Mapping[str, Tuned] = {
    FULL: Tuned(flags=("--tuning", "full"), tokens="tokens"),
    "full, then groupwise": Tuned(flags=("--tuning", "groupwise"), tokens="tokens of a second run", start=FULL),
    "full, then on-policy": Tuned(
        flags=("--tuning", "full", "--on-policy", "1"), tokens="tokens of a second run", start=FULL
    ),
}
CELLS = ["dense", "pruned", FULL]
EXTRA = [name for name in TUNED if name != FULL]
OPTIONS = INSTRUCTIONS
SETTINGS = {
    "model": "{model}", "preset": "default", "pruning ratio": 0.2,
    "tokens": Scaled(256, 200_000), "tokens of a second run": Scaled(128, 40_000), "instructions": 1000,
    "measured tokens": Scaled(512, 4096), "prompts": BUNDLED, "written tokens": Scaled(8, 128),
    "open prompts": Scaled(1, 12), "facts": Scaled(2, 32),
    "tunings": [f"{name}: {' '.join(run.flags)}, from {run.start}" for name, run in TUNED.items()],
}  # fmt: skip
DECIDED_BY = MAKING


def measure(request: Request, wanted: Names) -> Measured:
    """Tune the pruned model in each way, with the dense model as teacher; tuned models are kept in the work folder."""
    return measured_states(request, wanted, partial(made, request))


def made(request: Request, state: str) -> tuple[Path, Values]:
    """The folder of a state, and what the tuning cost, if it is tuned; made with what it begins from, if missing."""
    if state == "pruned":
        return pruned_folder(request), {}
    run = TUNED[state]
    start, _ = made(request, run.start)
    out = request.work.resolve() / f"own-data-{state.replace(', ', '-').replace(' ', '-')}"
    known = out.with_suffix(".json")
    if not known.is_file():
        flags = [*run.flags, "--max-tokens", request.settings[run.tokens], *data(request)]
        flags += request.size(["--max-seq-length", 64, "--validation-samples", 1], [])
        report, _, used = timed_saap("recover", start, "--dense", request.model, *flags, "--out", out)
        write_json(known, {"tokens": report["tokens"], "processor_seconds": used, "curve": curve_of(out)})
    return out, json.loads(known.read_text())


def data(request: Request) -> list[str]:
    """Flags of text like what is measured: another split of WikiText-2, speeches, and other instructions."""
    found = ["--data", VALIDATION, "--data", "speeches"]
    if "instructions" not in request.given:
        return found
    file = request.work.resolve() / "instructions.jsonl"
    rows = Path(request.given["instructions"]).read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(rows[RECORDS : RECORDS + request.settings["instructions"]]), encoding="utf-8")
    return [*found, "--data", str(file)]


def summarise(cells: Cells) -> Values:
    return {**gap_closed(cells, TUNED), "full": FULL, "unread": UNREAD}


def figures(summary: Values) -> Figures:
    values = {state: list(each.values()) for state, each in summary["closed"].items()}
    return [bars("own-data", values, summary["texts"], x="share of the gap closed")]
