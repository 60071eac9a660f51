"""Our method and the baselines on the real model, with and without our restoration for everybody.

Same calibration, same number of parameters; so the gain of selection and of restoration are told apart.

    python benchmarks/compare.py [--task-data DIR] [--out DIR]       # all passes; started again, it goes on
    python benchmarks/compare.py --passes tasks main --ratios 0.2    # a part of it
    python benchmarks/compare.py --table [--out DIR]                 # only the tables of benchmarks/README.md
    python benchmarks/compare.py --trial --out DIR [...]             # few tokens, effort fast, no table: does it run?

Calibrated on 64 x 128 tokens of WikiText-2 validation, restored with 16,384 tokens of it, measured on WikiText-2 test
(first 16,384 tokens, windows of 512). Passes, each a `saap compare` into the same folder:

    tasks   the methods of TASK_METHODS at 20 %, with zero-shot tasks (needs --task-data)
    main    the methods of MAIN at 20, 30, 10 and 50 %
    others  the methods of OTHERS at the same ratios
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from readme_tables import write_between_marks

from saap.evaluation.bootstrap import kept_difference, usual_answers
from saap.evaluation.zero_shot import TaskResult
from saap.reporting.tables import comparison_table, number, ratio_table, task_table, to_markdown

ROOT = Path(__file__).resolve().parent.parent
# Relative to ROOT, where the commands run: the records of a run name no place of the machine.
CALIBRATION = "benchmarks/data/wikitext2/validation.jsonl.gz"
TEST = "benchmarks/data/wikitext2/test.jsonl.gz"
RESULTS = Path("benchmarks/results/compare")
# LLM-Pruner and Wanda-sp are at their best on this model when they leave attention alone, so they are shown so, and
# with attention too.
MAIN = ("saap", "llm-pruner-element2@ffn", "llm-pruner-element1@ffn", "flap", "wanda-sp@ffn", "block-influence")
OTHERS = (
    "llm-pruner-vector@ffn", "llm-pruner-mixed@ffn", "llm-pruner-element2", "wanda-sp", "magnitude@ffn", "random@ffn",
)  # fmt: skip
TASK_METHODS = ("saap", "llm-pruner-element2@ffn", "flap", "wanda-sp@ffn")
TASKS = "arc_easy,piqa,boolq,openbookqa"
TASK_RATIO = "0.2"
# The usual ratios come first: a run that is stopped early has them.
RATIOS = ("0.2", "0.3", "0.1", "0.5")
PASSES = ("tasks", "main", "others")
FULL = ("64", "16384", "16384", "default")
"""Calibration samples, tokens of the restoration, tokens that perplexity is measured on, effort."""


def command(options: argparse.Namespace, methods: str, ratios: str, *, with_tasks: bool) -> list[str]:
    samples, refit, measured, effort = ("8", "2048", "2048", "fast") if options.trial else FULL
    arguments = [
        "compare", "smollm2", "--out", str(options.out), "--methods", methods, "--pruning-ratios", ratios,
        "--restore", options.restore, "--calibration", CALIBRATION,
        "--samples", samples, "--sample-length", "128", "--refit-tokens", refit, "--effort", effort,
        "--perplexity", TEST, "--window", "512", "--max-tokens", measured,
    ]  # fmt: skip
    if options.task_data is not None:
        arguments += ["--tasks", TASKS, "--task-data", str(options.task_data), "--limit", str(options.limit)]
        arguments += ["--rounded-tasks", "--task-ratios", TASK_RATIO if with_tasks else "none"]
    return arguments


def commands(options: argparse.Namespace) -> list[list[str]]:
    """The passes that were asked for, one command each."""

    def chosen(methods: tuple[str, ...]) -> str:
        return ",".join(method for method in methods if options.methods is None or method in options.methods)

    found = []
    at_task_ratio = TASK_RATIO in options.ratios
    if "tasks" in options.passes and options.task_data is not None and at_task_ratio and chosen(TASK_METHODS):
        found.append(command(options, chosen(TASK_METHODS), TASK_RATIO, with_tasks=True))
    for name, methods in (("main", MAIN), ("others", OTHERS)):
        if name in options.passes and chosen(methods):
            for ratios in (options.ratios[:2], options.ratios[2:]):  # those of a command share the scores
                if ratios:
                    found.append(command(options, chosen(methods), ",".join(ratios), with_tasks=False))
    return found


def best_baseline(comparison: dict[str, Any]) -> str:
    """Our perplexity ratio over that of the best baseline, by pruning ratio and restoration."""
    lines = []
    # Our default restores, so a user's first comparison is it against the baselines as they were published.
    for ours_restored, theirs_restored, label in ((False, False, "nobody"), (True, True, "all"), (True, False, "ours")):
        for ratio in sorted({row["ratio"] for row in comparison["rows"]}):
            rows = [row for row in comparison["rows"] if row["ratio"] == ratio and row["ratios"][TEST]]
            ours = [r["ratios"][TEST] for r in rows if r["method"] == "saap" and r["restored"] is ours_restored]
            theirs = {
                row["method"]: row["ratios"][TEST]
                for row in rows
                if row["method"] != "saap" and row["restored"] is theirs_restored
            }
            if ours and theirs:
                best = min(theirs, key=lambda method: theirs[method])
                quotient = f"{ours[0] / theirs[best]:.2f}"
                lines.append([f"{ratio:.0%}", label, f"{ours[0]:.3f}", f"{best} {theirs[best]:.3f}", quotient])
    return to_markdown((["removed", "restored", "saap", "best baseline", "quotient"], lines))


def differences(comparison: dict[str, Any]) -> str:
    """How much more of the accuracy above chance saap keeps than each baseline, from paired draws of the questions."""
    dense = _results(comparison["dense"]["tasks"])
    chance = [result.chance for result in dense.values()]
    answers = {
        (row["method"], row["restored"]): _answers(_results(row["tasks"]))
        for row in comparison["rows"]
        if row["ratio"] == float(TASK_RATIO) and row["tasks"]
    }
    lines = []
    for (method, restored), theirs in answers.items():
        ours = answers.get(("saap", restored))
        if method == "saap" or ours is None:
            continue
        found = kept_difference(_answers(dense), ours, theirs, chance)
        interval = f"{number(found.value)} ({number(found.low)} to {number(found.high)})"
        lines.append([method, "yes" if restored else "no", interval])
    return to_markdown((["against", "restored", "saap keeps more by (95 %)"], lines))


def _results(tasks: dict[str, Any]) -> dict[str, TaskResult]:
    return {name: TaskResult(**values) for name, values in tasks.items()}


def _answers(results: dict[str, TaskResult]) -> list[tuple[int, ...]]:
    return [usual_answers(name, result) for name, result in results.items()]


def table(options: argparse.Namespace) -> None:
    file = ROOT / options.out / "comparison.json"
    if options.task_data is not None:
        file.write_text(file.read_text().replace(str(options.task_data), "DIR"))
    comparison = json.loads(file.read_text())
    titles = {False: "cut only", True: "with our restoration for all"}
    parts = [
        f"Perplexity / dense, {title}:\n\n" + to_markdown(ratio_table(comparison, TEST, restored))
        for restored, title in titles.items()
        if any(row["restored"] is restored for row in comparison["rows"])
    ]
    parts.append("Against the best baseline; restored: nobody, all, or ours alone:\n\n" + best_baseline(comparison))
    if any(row["tasks"] for row in comparison["rows"]):
        parts.append("Zero-shot at 20 %:\n\n" + to_markdown(task_table(comparison, float(TASK_RATIO))))
        parts.append("Share of the dense accuracy above chance, paired:\n\n" + differences(comparison))
    parts.append("All that was measured:\n\n" + to_markdown(comparison_table(comparison)))
    write_between_marks("compare", "\n".join(parts).rstrip("\n"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task-data", type=Path, metavar="DIR", help="folder with TASK.SPLIT.jsonl files")
    parser.add_argument("--limit", type=int, default=500, help="questions of each task")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--methods", nargs="+", choices=(*MAIN, *OTHERS), help="only these")
    parser.add_argument("--ratios", nargs="+", choices=RATIOS, default=RATIOS, help="only these, in this order")
    parser.add_argument("--restore", choices=("both", "yes", "no"), default="both")
    parser.add_argument("--trial", action="store_true", help="few tokens, effort fast, no table")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--table", action="store_true", help="only write the tables")
    options = parser.parse_args()
    if options.task_data is not None:
        options.task_data = options.task_data.resolve()
    if options.trial and options.out == RESULTS:
        parser.error("--trial is no result: name another --out")
    start = time.perf_counter()
    for arguments in [] if options.table else commands(options):
        subprocess.run([sys.executable, "-m", "saap", *arguments], check=True, cwd=ROOT)
        print(f"{(time.perf_counter() - start) / 60:.0f} minutes so far", file=sys.stderr)
    if not options.trial:
        table(options)


if __name__ == "__main__":
    main()
