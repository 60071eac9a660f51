"""What only an accelerator can show: its tests, LLaMA-7B in bfloat16, and a model of 1.5 billion parameters end to end.

    python benchmarks/gpu.py [--model FILE.gguf] [--folder DIR]    # within 20 minutes on one card; or `make gpu`
    python benchmarks/gpu.py --table                               # the table in benchmarks/README.md, from the results
    python benchmarks/gpu.py --smoke --out DIR                     # every step with tiny models, on whatever is there

Steps, each a process of its own; a finished one is kept, so the same command goes on where it was stopped:

- tests: those marked `gpu`.
- 7b: random weights in the sizes of LLaMA-7B, pruned by 20 % with effort `default`. What it computes is of no interest,
  only time and peak memory of every stage.
- 1.5b: random weights in the sizes of Qwen2.5 1.5B, pruned and tuned: for a machine that gets no packages.
- real: the same with the weights of `--model` (Qwen2.5-Coder 1.5B, say), and perplexity before and after.

Writes benchmarks/results/gpu/STEP.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from readme_tables import write_between_marks
from shapes import SHAPES, Shape, byte_tokenizer, write_checkpoint

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
TEXT = ROOT / "benchmarks" / "data" / "wikitext2" / "test.jsonl.gz"
TINY = Shape(64, 160, 2, 4, vocabulary=320)
PRUNE = ["--pruning-ratio", "0.2"]
RECOVER = ["--max-minutes", "2"]
SMOKE_PRUNE = ["--effort", "fast", "--samples", "4", "--sample-length", "32", "--refit-tokens", "1024"]
SMOKE_RECOVER = ["--max-steps", "2", "--length", "32"]


@dataclass(frozen=True)
class Options:
    """folder: for checkpoints. model: of the step `real`. smoke: tiny models in place of the large ones."""

    folder: Path
    out: Path
    model: Path | None
    smoke: bool

    def shape(self, name: str) -> Shape:
        return replace(TINY, key_heads=SHAPES[name].key_heads) if self.smoke else SHAPES[name]


def saap(*arguments: object) -> dict[str, Any]:
    """What a command prints as JSON."""
    command = [sys.executable, "-m", "saap", *map(str, arguments), "--json"]
    return dict(json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout))


def stages(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = ("name", "seconds", "peak_resident_bytes", "peak_device_bytes")
    return [{name: stage[name] for name in names} for stage in report["stages"]]


def run_tests(options: Options) -> dict[str, Any]:
    folder = "tests/cli" if options.smoke else "tests"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-4000:])
    return {"summary": done.stdout.strip().splitlines()[-1]}


def random_checkpoint(options: Options, name: str) -> Path:
    """Written once; another step and a run that goes on take it up."""
    folder = options.folder / f"random-{name}"
    if not (folder / "tokenizer.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_checkpoint(options.shape(name), folder)
        byte_tokenizer().save_pretrained(folder)
    return folder


def prune(options: Options, source: Path, name: str) -> tuple[Path, dict[str, Any]]:
    out = options.folder / f"pruned-{name}"
    flags = [*PRUNE, *(SMOKE_PRUNE if options.smoke else ["--effort", "default"])]
    report = saap("prune", source, "--out", out, "--overwrite", *flags)
    return out, {"command": " ".join(["saap prune MODEL", *flags]), "stages": stages(report)}


def prune_7b(options: Options) -> dict[str, Any]:
    source = random_checkpoint(options, "7b")
    out, found = prune(options, source, "7b")
    for folder in (source, out):
        shutil.rmtree(folder)
    return {"parameters": options.shape("7b").parameters, **found}


def all_stages(options: Options, source: Path, name: str) -> dict[str, Any]:
    """Pruned, restored, and tuned for some minutes on the bundled text."""
    out, pruned = prune(options, source, name)
    flags = SMOKE_RECOVER if options.smoke else RECOVER
    tuned = options.folder / f"tuned-{name}"
    report = saap("recover", out, "--out", tuned, "--overwrite", *flags)
    return {"prune": pruned, "recover": {"command": " ".join(["saap recover", *flags]), "stages": stages(report)}}


def prune_1_5b(options: Options) -> dict[str, Any]:
    source = random_checkpoint(options, "1.5b")
    return {"parameters": options.shape("1.5b").parameters, **all_stages(options, source, "1.5b")}


def prune_real(options: Options) -> dict[str, Any]:
    source = options.model or random_checkpoint(options, "1.5b")
    found = all_stages(options, source, "real")
    tokens = "600" if options.smoke else "16384"
    measured = {
        name: saap("eval", model, "--perplexity", TEXT, "--max-tokens", tokens)["perplexity"][str(TEXT)]["value"]
        for name, model in (
            ("dense", source), ("pruned", options.folder / "pruned-real"), ("tuned", options.folder / "tuned-real"),
        )
    }  # fmt: skip
    return {"model": source.name, **found, "perplexity": measured}


STEPS: Mapping[str, Callable[[Options], dict[str, Any]]] = {
    "tests": run_tests,
    "7b": prune_7b,
    "1.5b": prune_1_5b,
    "real": prune_real,
}


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "Apple GPU" if torch.backends.mps.is_available() else platform.processor() or "CPU"


def carry_out(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    for name, step in STEPS.items():
        file = options.out / f"{name}.json"
        if file.exists() or (name == "real" and options.model is None and not options.smoke):
            continue
        start = time.perf_counter()
        found = step(options)
        seconds = round(time.perf_counter() - start, 1)
        result = {"device": device_name(), "torch": torch.__version__, "seconds": seconds, **found}
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {seconds} s", flush=True)


def table() -> str:
    """Every stage of every step that has run; nothing where no accelerator was at hand yet."""
    rows = []
    for name in STEPS:
        file = RESULTS / f"{name}.json"
        found = json.loads(file.read_text()) if file.exists() else {}
        for command, part in (("prune", found.get("prune", found)), ("recover", found.get("recover", {}))):
            rows += [
                f"| {name} | {found['device']} | {command} | {stage['name']} | {stage['seconds']:.1f} "
                f"| {stage['peak_device_bytes'] / 1e9:.1f} |"
                for stage in part.get("stages", ())
            ]
    if not rows:
        return "No accelerator was at hand: nothing of this has been measured."
    return "\n".join(
        ["| step | device | command | stage | s | peak device memory, GB |", "|---|---|---|---|---|---|", *rows]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="GGUF file or folder of a real model for the step `real`")
    parser.add_argument("--folder", type=Path, help="of checkpoints; without it one in the system's temporary folder")
    parser.add_argument("--out", type=Path, help="of results; benchmarks/results/gpu, with --smoke inside --folder")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--table", action="store_true")
    chosen = parser.parse_args()
    if not chosen.table:
        if not (chosen.smoke or torch.cuda.is_available() or torch.backends.mps.is_available()):
            parser.error("there is no accelerator here; --smoke tries every step on the CPU")
        folder = chosen.folder or Path(tempfile.gettempdir()) / f"saap-gpu{'-smoke' if chosen.smoke else ''}"
        out = chosen.out or (folder / "results" if chosen.smoke else RESULTS)
        carry_out(Options(folder, out, chosen.model, chosen.smoke))
    if not chosen.smoke:
        write_between_marks("gpu", table())


if __name__ == "__main__":
    main()
