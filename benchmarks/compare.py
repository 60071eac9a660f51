"""Our method and the baselines on the real model, with and without our restoration for everybody.

Same calibration, same number of parameters; so the gain of selection and of restoration are told apart.

    python benchmarks/compare.py --task-data DIR [--out DIR] [--quick]
    python benchmarks/compare.py --table [--out DIR]     # writes the tables of benchmarks/README.md from DIR

It runs one `saap compare` at 10, 20, 30 and 50 %, calibrated on WikiText-2 validation, measured on WikiText-2 test
(first 16,384 tokens, windows of 512) and, with --task-data, on the first 500 questions of four zero-shot tasks. Started
again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from readme_tables import write_between_marks

from saap.reporting.tables import comparison_table, ratio_table, to_markdown

HERE = Path(__file__).resolve().parent
WIKITEXT2 = HERE / "data" / "wikitext2"
TEST = str(WIKITEXT2 / "test.jsonl.gz")
# LLM-Pruner is at its best on this model when it leaves attention alone, so it is shown so, and as published.
METHODS = (
    "saap", "llm-pruner-element2@ffn", "llm-pruner-element1@ffn", "llm-pruner-vector@ffn", "llm-pruner-mixed@ffn",
    "llm-pruner-element2", "flap", "wanda-sp", "magnitude@ffn", "random@ffn", "block-influence",
)  # fmt: skip
TASKS = "arc_easy,piqa,boolq,openbookqa"
RATIOS = "0.1,0.2,0.3,0.5"


def command(options: argparse.Namespace) -> list[str]:
    arguments = [
        "compare", "smollm2", "--out", str(options.out), "--methods", ",".join(METHODS),
        "--pruning-ratios", "0.2" if options.quick else RATIOS, "--restore", "both",
        "--calibration", str(WIKITEXT2 / "validation.jsonl.gz"), "--samples", "64", "--sample-length", "128",
        "--refit-tokens", "16384", "--perplexity", TEST, "--window", "512", "--max-tokens", "16384",
    ]  # fmt: skip
    if options.quick:
        arguments += ["--effort", "fast"]
    if options.task_data is not None:
        arguments += ["--tasks", TASKS, "--task-data", str(options.task_data), "--limit", "500"]
    return arguments


def best_baseline(comparison: dict[str, Any]) -> str:
    """Our perplexity ratio over that of the best baseline, by pruning ratio and restoration."""
    lines = []
    for restored in (False, True):
        for ratio in sorted({row["ratio"] for row in comparison["rows"]}):
            same = [row for row in comparison["rows"] if (row["ratio"], row["restored"]) == (ratio, restored)]
            ours = next(row["ratios"][TEST] for row in same if row["method"] == "saap")
            others = {row["method"]: row["ratios"][TEST] for row in same if row["method"] != "saap"}
            best = min(others, key=lambda method: others[method])
            lines.append([f"{ratio:.0%}", "yes" if restored else "no", f"{ours:.3f}", f"{best} {others[best]:.3f}",
                          f"{ours / others[best]:.2f}"])  # fmt: skip
    # Our default restores; the first comparison a user makes is it against the baselines as published.
    for ratio in sorted({row["ratio"] for row in comparison["rows"]}):
        rows = [row for row in comparison["rows"] if row["ratio"] == ratio]
        ours = next(row["ratios"][TEST] for row in rows if row["method"] == "saap" and row["restored"])
        plain = {row["method"]: row["ratios"][TEST] for row in rows if row["method"] != "saap" and not row["restored"]}
        best = min(plain, key=lambda method: plain[method])
        lines.append(
            [f"{ratio:.0%}", "ours only", f"{ours:.3f}", f"{best} {plain[best]:.3f}", f"{ours / plain[best]:.2f}"]
        )
    return to_markdown((["removed", "restoration", "saap", "best baseline", "quotient"], lines))


def table(out: Path) -> None:
    comparison = json.loads((out / "comparison.json").read_text())
    parts = [
        f"Perplexity / dense, {'with our restoration for all' if restored else 'cut only'}:\n\n"
        + to_markdown(ratio_table(comparison, TEST, restored))
        for restored in (False, True)
    ]
    parts += ["Ours against the best baseline:\n\n" + best_baseline(comparison)]
    parts += ["All that was measured:\n\n" + to_markdown(comparison_table(comparison))]
    write_between_marks("compare", "\n".join(parts).rstrip("\n"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task-data", type=Path, metavar="DIR", help="folder with TASK.SPLIT.jsonl files")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "compare", metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="20 %% only, effort fast")
    parser.add_argument("--table", action="store_true", help="only write the tables")
    options = parser.parse_args()
    if not options.table:
        subprocess.run([sys.executable, "-m", "saap.cli", *command(options)], check=True)
    table(options.out)


if __name__ == "__main__":
    main()
