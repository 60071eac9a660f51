"""Prefill and decode tokens/s of pruned folders beside the dense model, in turns, in llama.cpp and in transformers.

    python benchmarks/speed.py FOLDER [FOLDER ...] [--dense smollm2] [--rounds 7] [--threads 2] [--weights TYPE ...]
    python benchmarks/speed.py --table     # the tables of README.md, from results/speed.json

For each folder and runtime: the speed-up of prefill and decode (medians of the rounds' ratios), the ratio of the bytes
that a decoded token reads, and the decode speed-up over that ratio. Folders that were made with --target-speedup give a
second table: asked, predicted and reached, from their manifests. --weights: only these types, in llama.cpp; the rows
of the other types are kept, so that those of one type are of one run. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from readme_tables import write_between_marks

from saap.core.manifest import RunManifest
from saap.pipeline.evaluate.speed import Source, measure_beside
from saap.pipeline.shared.inputs import RunOptions, open_model
from saap.settings.measure import SpeedSettings
from saap.settings.prune import GgufType, RuntimeName

RESULTS = Path(__file__).resolve().parent / "results" / "speed.json"
RUNTIMES = (
    (RuntimeName.LLAMA_CPP, GgufType.F16),
    (RuntimeName.LLAMA_CPP, GgufType.Q8_0),
    (RuntimeName.LLAMA_CPP, GgufType.Q4_1),
    (RuntimeName.TRANSFORMERS, GgufType.F16),
)
ORDER = ("f16", "q8_0", "q4_1", "float32")
"""Of the rows, by the type of the weights; transformers has float32."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="FOLDER")
    parser.add_argument("--dense", default="smollm2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", nargs="+", choices=ORDER[:-1], help="types to measure again")
    parser.add_argument("--table", action="store_true", help="only write the tables again")
    given = parser.parse_args()
    if given.table:
        write_tables(json.loads(RESULTS.read_text()))
        return
    if not given.folders:
        parser.error("name at least one pruned folder")
    torch.set_num_threads(given.threads)
    kept = kept_result(given)
    rows, asked = kept["rows"], [found for folder in given.folders if (found := asked_and_reached(folder)) is not None]
    for runtime, kind in RUNTIMES:
        if given.weights and (runtime is not RuntimeName.LLAMA_CPP or kind not in given.weights):
            continue
        settings = SpeedSettings(runtime=runtime, gguf_type=kind, rounds=given.rounds, new_tokens=given.new_tokens)
        dense: Source = given.dense
        if runtime is RuntimeName.TRANSFORMERS:
            dense = open_model(given.dense, RunOptions(device="cpu")).model
        for folder in given.folders:
            rows.append(measure(folder, dense, settings))
            print(json.dumps(rows[-1]), flush=True)
    rows.sort(key=lambda row: ORDER.index(row["weights"]))
    result = {**conditions(given), "rows": rows, "asked": kept["asked"] + asked}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    write_tables(result)


def conditions(given: argparse.Namespace) -> dict[str, Any]:
    return {"dense": given.dense, "threads": given.threads, "rounds": given.rounds}


def kept_result(given: argparse.Namespace) -> dict[str, list[Any]]:
    """Rows of the types that stay, and what was asked for with other folders; nothing where all is measured."""
    if not given.weights:
        return {"rows": [], "asked": []}
    before = json.loads(RESULTS.read_text())
    if conditions(given) != {name: before[name] for name in conditions(given)}:
        raise SystemExit("the other types were measured under other conditions: measure all of them")
    folders = [name_of(folder) for folder in given.folders]
    rows = [row for row in before["rows"] if row["weights"] not in given.weights]
    return {"rows": rows, "asked": [row for row in before["asked"] if row["folder"] not in folders]}


def measure(folder: str, dense: Source, settings: SpeedSettings) -> dict[str, Any]:
    report = measure_beside([(folder, folder), ("dense", dense)], settings)
    manifest = read_manifest(folder)
    assert report.against is not None
    assert report.decode_speedup is not None
    assert report.bytes_ratio is not None
    return {
        "folder": name_of(folder), "layout": str(manifest.layout), "removed": manifest.block_parameters.removed,
        "runtime": report.runtime, "weights": report.weights,
        "prefill_dense": report.against.prefill, "prefill": report.model.prefill,
        "prefill_speedup": report.prefill_speedup,
        "decode_dense": report.against.decode, "decode": report.model.decode, "decode_speedup": report.decode_speedup,
        "bytes_dense": report.against.bytes_per_token, "bytes": report.model.bytes_per_token,
        "bytes_ratio": report.bytes_ratio, "over_bytes": report.decode_speedup / report.bytes_ratio,
    }  # fmt: skip


def asked_and_reached(folder: str) -> dict[str, Any] | None:
    manifest = read_manifest(folder)
    if manifest.speed is None:
        return None
    removed = manifest.block_parameters.removed
    return {
        "folder": name_of(folder),
        "layout": str(manifest.layout),
        "removed": removed,
        **manifest.speed.model_dump(),
    }


def read_manifest(folder: str) -> RunManifest:
    return RunManifest.model_validate_json((Path(folder) / "saap" / "manifest.json").read_bytes())


def name_of(folder: str) -> str:
    """The last two parts of the path at most: no folder of this machine."""
    return "/".join(Path(folder).resolve().parts[-2:])


def write_tables(result: dict[str, Any]) -> None:
    lines = [
        "| runtime | weights | layout | removed | prefill, tokens/s | speed-up | decode, tokens/s | speed-up | "
        "bytes / token, dense ÷ pruned | decode speed-up / that |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['runtime']} | {row['weights']} | {row['layout']} | {row['removed']:.1%} | "
        f"{row['prefill_dense']:.0f} → {row['prefill']:.0f} | {row['prefill_speedup']:.2f} | "
        f"{row['decode_dense']:.1f} → {row['decode']:.1f} | {row['decode_speedup']:.3f} | {row['bytes_ratio']:.3f} | "
        f"{row['over_bytes']:.3f} |"
        for row in result["rows"]
    ]
    write_between_marks("speed", "\n".join(lines))
    lines = [
        "| runtime | weights | layout | removed | asked | predicted | reached | reached / asked |",
        "|" + "---|" * 8,
    ]
    lines += [
        f"| {row['runtime']} | {row['weights']} | {row['layout']} | {row['removed']:.1%} | {row['asked']:.2f} | "
        f"{row['predicted']:.3f} | {row['reached']:.3f} | {row['reached'] / row['asked']:.3f} |"
        for row in result["asked"]
    ]
    write_between_marks("asked speed", "\n".join(lines) if result["asked"] else "")


if __name__ == "__main__":
    main()
