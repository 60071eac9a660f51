"""Prunes the real model as a user would and measures the result on texts that nothing was calibrated on.

    python benchmarks/prune.py default-wikitext2 [more rows] [--instructions FILE] [--keep DIR]
    python benchmarks/prune.py default-mixed default-mixed-no-bos --model NAME=MODEL      # of another model
    python benchmarks/prune.py --list
    python benchmarks/prune.py --table        # writes the tables of benchmarks/README.md from benchmarks/results

Each row runs one `saap prune` in a process of its own, then perplexities, and writes benchmarks/results/ROW.json, of
another model results/NAME/ROW.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from readme_tables import write_between_marks

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
WIKITEXT2 = HERE / "data" / "wikitext2"
TOKENS = {"wikitext2": 16384, "novel": 8192, "addresses": 8192, "instructions": 8192}

ON_WIKITEXT2 = ["--calibration", str(WIKITEXT2 / "validation.jsonl.gz")]
ROWS: dict[str, list[str]] = {
    "fast-wikitext2": ["--pruning-ratio", "0.2", "--effort", "fast", *ON_WIKITEXT2],
    "default-wikitext2": ["--pruning-ratio", "0.2", *ON_WIKITEXT2],
    "best-wikitext2": ["--pruning-ratio", "0.2", "--effort", "best", *ON_WIKITEXT2],
    "fast-mixed": ["--pruning-ratio", "0.2", "--effort", "fast"],
    "default-mixed": ["--pruning-ratio", "0.2"],
    "default-mixed-no-bos": ["--pruning-ratio", "0.2", "--no-bos"],
    "best-mixed": ["--pruning-ratio", "0.2", "--effort", "best"],
    "default-wikitext2-10": ["--pruning-ratio", "0.1", *ON_WIKITEXT2],
    "default-wikitext2-30": ["--pruning-ratio", "0.3", *ON_WIKITEXT2],
    "default-wikitext2-50": ["--pruning-ratio", "0.5", *ON_WIKITEXT2],
    "default-wikitext2-uniform": ["--pruning-ratio", "0.2", "--layout", "uniform", *ON_WIKITEXT2],
}


def texts(instructions: Path | None) -> dict[str, Path]:
    found = {
        "wikitext2": WIKITEXT2 / "test.jsonl.gz",
        "novel": HERE / "data" / "novel.txt.gz",
        "addresses": HERE / "data" / "addresses.txt.gz",
    }
    return {**found, "instructions": instructions} if instructions is not None else found


def records(file: Path) -> list[dict[str, str]]:
    """The rows of a .jsonl file that are measured."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:400]]


def as_text(file: Path, folder: Path) -> Path:
    """Rows of instruction, input and output as plain text; other files as they are."""
    if file.suffix != ".jsonl":
        return file
    rows = records(file)
    if "instruction" not in rows[0]:
        return file
    written = folder / "instructions.txt"
    blocks = ["\n".join(part for part in (r["instruction"], r.get("input", ""), r["output"]) if part) for r in rows]
    written.write_text("\n\n".join(blocks), encoding="utf-8")
    return written


def perplexities(model: str, named: dict[str, Path], folder: Path, *, bos: bool) -> dict[str, float]:
    import saap

    found = {}
    for name, file in named.items():
        report = saap.evaluate(model, texts=[as_text(file, folder)], max_tokens=TOKENS[name], bos=bos)
        (value,) = report.perplexity.values()
        found[name] = value.value
    return found


def run(row: str, named: dict[str, Path], keep: Path | None, model: str, results: Path) -> None:
    bos = "--no-bos" not in ROWS[row]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        out = keep / row if keep is not None else folder / "pruned"
        command = ["saap", "prune", model, *ROWS[row]]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "saap", *command[1:], "--out", str(out), "--overwrite", "--json"],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        report = json.loads(done.stdout)
        dense_file = results / ("dense.json" if bos else "dense-no-bos.json")
        dense = json.loads(dense_file.read_text()) if dense_file.exists() else {}
        lacking = {name: file for name, file in named.items() if name not in dense}
        dense |= perplexities(model, lacking, folder, bos=bos) if lacking else {}
        results.mkdir(exist_ok=True)
        dense_file.write_text(json.dumps(dense, indent=1) + "\n")
        pruned = perplexities(str(out), named, folder, bos=bos)
    shown = " ".join(["saap", "prune", Path(model).name, *ROWS[row]]).replace(str(HERE.parent) + os.sep, "")
    result = {
        "command": shown,
        "seconds": round(seconds, 1),
        "load": round(os.getloadavg()[1], 1),
        "stages": {stage["name"]: round(stage["seconds"], 1) for stage in report["stages"]},
        "peak_resident_bytes": max(stage["peak_resident_bytes"] for stage in report["stages"]),
        "pruning_ratio": report["pruning_ratio"],
        "parameters": report["parameters"],
        "dtype": report["dtype"],
        "perplexity_dense": {name: dense[name] for name in pruned},
        "perplexity": pruned,
        "ratio": {name: value / dense[name] for name, value in pruned.items()},
        "trail": report["trail"],
        "environment": {
            "python": platform.python_version(), "cores": os.cpu_count(), "machine": platform.machine(),
            "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        },
    }  # fmt: skip
    (results / f"{row}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"row": row, "seconds": result["seconds"], **result["ratio"]}))


def table() -> None:
    names = list(TOKENS)
    lines = [
        "| row | " + " | ".join(names) + " | removed | time, s | peak memory, GB |",
        "|---" * (len(names) + 4) + "|",
    ]
    for row in ROWS:
        file = RESULTS / f"{row}.json"
        if not file.exists():
            continue
        result = json.loads(file.read_text())
        ratios = [f"{result['ratio'][name]:.3f}" if name in result["ratio"] else "" for name in names]
        cores = result["environment"]["cores"]
        busy = result.get("load", 0) > 1.5 * cores or result["environment"].get("threads", cores) < cores
        seconds = "beside other work" if busy else f"{result['seconds']:.0f}"
        share, memory = f"{result['pruning_ratio']:.1%}", f"{result['peak_resident_bytes'] / 1e9:.1f}"
        lines.append(f"| {row} | {' | '.join(ratios)} | {share} | {seconds} | {memory} |")
    write_between_marks("table", "\n".join(lines))


def other_models() -> None:
    """Dense and pruned perplexities of every row of every other model."""
    names = [name for name in TOKENS if name != "instructions"]
    lines = ["| model | row | " + " | ".join(f"{name}: dense, pruned, ratio" for name in names) + " |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for file in sorted(RESULTS.glob("*/*.json")):
        result = json.loads(file.read_text())
        if file.stem in ROWS and "perplexity_dense" in result:
            dense, pruned, ratio = (result[key] for key in ("perplexity_dense", "perplexity", "ratio"))
            cells = [f"{dense[name]:.2f}, {pruned[name]:.2f}, {ratio[name]:.3f}" for name in names if name in ratio]
            lines.append(f"| {file.parent.name} | {file.stem} | {' | '.join(cells)} |")
    write_between_marks("other-models", "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", choices=[*ROWS, []])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--instructions", type=Path)
    parser.add_argument("--keep", type=Path, metavar="DIR")
    parser.add_argument("--model", default="=smollm2", metavar="NAME=MODEL", help="another model than SmolLM2")
    given = parser.parse_args()
    label, _, model = given.model.partition("=")
    if given.list:
        print("\n".join(f"{row}: saap prune smollm2 {' '.join(flags)}" for row, flags in ROWS.items()))
    for row in given.rows:
        run(row, texts(given.instructions), given.keep, model, RESULTS / label if label else RESULTS)
    if given.table:
        table()
        other_models()


if __name__ == "__main__":
    main()
