"""The baselines beside what the methods' published code gives on the same model.

    python benchmarks/baselines.py [--out DIR]           # runs one `saap compare`, writes results/baselines.json
    python benchmarks/baselines.py --table               # writes the table of benchmarks/README.md from it

20 % of the blocks' parameters, cut only, calibrated on 64 x 128 tokens of WikiText-2 validation; perplexity ratio on
the first 16,384 tokens of WikiText-2 test, windows of 512. LLM-Pruner: FFN channels of layers 4 to 27.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from readme_tables import write_between_marks

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "baselines.json"
# Relative to ROOT, where the command runs: its records name no place of the machine.
CALIBRATION = "benchmarks/data/wikitext2/validation.jsonl.gz"
TEST = "benchmarks/data/wikitext2/test.jsonl.gz"
TOLERANCE = 0.05
PUBLISHED = {
    "llm-pruner-element2@ffn": 1.57,
    "llm-pruner-element1@ffn": 1.63,
    "llm-pruner-vector@ffn": 2.19,
    "flap": 1.68,
    "wanda-sp": 1.69,
    "block-influence": 2.94,
}
"""Ratios of the methods' own code, run by hand with the same protocol; inputs of this benchmark, not its output."""


def run(out: Path, seeds: str) -> None:
    command = [
        "compare", "smollm2", "--out", str(out), "--methods", ",".join(PUBLISHED), "--pruning-ratios", "0.2",
        "--restore", "no", "--seeds", seeds, "--calibration", CALIBRATION,
        "--samples", "64", "--sample-length", "128", "--perplexity", TEST, "--window", "512", "--max-tokens", "16384",
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "saap", *command], check=True, cwd=ROOT)
    keep(out)


def keep(out: Path) -> None:
    """Write what the table needs of a finished comparison."""
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    kept = [
        {"method": row["method"], "seed": row["seed"], "ratio": row["ratios"][TEST], "removed": row["pruning_ratio"]}
        for row in rows
    ]
    RESULT.write_text(json.dumps(kept, indent=1) + "\n")


def table() -> None:
    rows = json.loads(RESULT.read_text())
    lines = ["| method | published code | saap, by seed | mean / published | within 5 % |", "|---|---|---|---|---|"]
    for method, expected in PUBLISHED.items():
        found = [row["ratio"] for row in rows if row["method"] == method]
        if not found:
            lines.append(f"| {method} | {expected} | not run with the present version | | |")
            continue
        quotient = sum(found) / len(found) / expected
        fits = "yes" if abs(quotient - 1) <= TOLERANCE else "no"
        shown = ", ".join(f"{value:.3f}" for value in found)
        lines.append(f"| {method} | {expected} | {shown} | {quotient:.2f} | {fits} |")
    write_between_marks("baselines", "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the comparison, to go on in it")
    parser.add_argument("--seeds", default="0", help="seeds of the calibration samples")
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    if not options.table:
        with tempfile.TemporaryDirectory() as temporary:
            run(Path(temporary) / "baselines" if options.out is None else options.out.resolve(), options.seeds)
    table()


if __name__ == "__main__":
    main()
