"""Digests of what small runs give, to compare before and after a change that should compute the same.

    export PYTHONPATH=.:benchmarks
    python scripts/run_digests.py --out before.json               # some minutes on one core
    python scripts/run_digests.py --compare before.json           # exit code 1, and the cases that differ
    python scripts/run_digests.py --compare before.json --record  # none may differ: measured cells stay current

Families x layouts x roles x efforts x methods, several processes, recovery, comparison and evaluation: everything
through the command line and `import saap`, on models of the tests. A digest is of the kept units and of the bytes of
all weights, so it holds for one machine and one version of torch only. `--record` notes in
`benchmarks/equal_code.json` that the code before and after computes the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from experiments.registry import EXPERIMENTS
from harness.digests import digests, record_equal
from safetensors.torch import load_file
from tests import families
from tests.pipeline import tiny
from transformers import AutoModelForCausalLM

import saap

IN_MEMORY: dict[str, Any] = {
    "pruning_ratio": 0.2,
    "num_samples": 6,
    "sample_length": 12,
    "refit_tokens": 1024,
    "align": 8,
}
MANY = ("llama", "gemma2", "gpt2", "phi3", "bloom", "opt", "falcon", "codegen", "olmo2", "qwen3", "mixtral", "gemma3")
METHODS = ("random", "magnitude", "llm-pruner-vector", "llm-pruner-mixed", "wanda-sp", "flap", "block-influence")
CUT_ONLY = {"refit_tokens": None, "restore": False}
LLAMA: dict[str, dict[str, Any]] = {
    "uniform": {"layout": "uniform"},
    "fast": {"effort": "fast"},
    "best": {"effort": "best", "num_samples": 4},
    "hidden": {"roles": ("ffn", "hidden")},
    "block": {"roles": ("ffn", "block")},
    "query": {"roles": ("ffn", "query")},
    "cut only": CUT_ONLY,
    "vector": {"importance": "vector"},
    "element1": {"importance": "element1"},
    "mixed": {"importance": "mixed"},
    "global": {"importance": "fused", "fusion_scope": "global"},
    "importance": {"strategy": "importance"},
    "volatility-z": {"strategy": "volatility-z"},
    "volatility-cv": {"strategy": "volatility-cv"},
    "skipped": {"skip_layers": (1, 0)},
    "seed": {"seed": 3},
    **{method: {**CUT_ONLY, "method": method} for method in METHODS},
    "flap restored": {"method": "flap", "restore": True},
}
FAST = ["--effort", "fast", "--num-samples", "6", "--sample-length", "32", "--refit-tokens", "2048", "--align", "16"]
WRITTEN: dict[str, list[str]] = {
    "default text": FAST,
    "own text": [*FAST, "--calibration", "TEXT"],
    "searched": [*FAST[2:], "--effort", "default", "--calibration", "TEXT"],
    "bfloat16": [*FAST, "--dtype", "bfloat16"],
    "two ratios": [*FAST, "--pruning-ratio", "0.1,0.3"],
    "parameters": [*FAST, "--target-params", "52k"],
}

NOT_RUN = ("benchmarks", "export", "vocabulary", "pipeline/shared/memory_estimate.py")
"""Parts that decide measured values, of which these runs say nothing."""


def digest(tensors: dict[str, torch.Tensor], keep: Any) -> str:
    """Of named tensors and of what was kept, as JSON says it."""
    found = hashlib.sha256(json.dumps(keep, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(name.encode() + str(tuple(tensor.shape)).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def in_memory(family: str, changes: dict[str, Any]) -> str:
    """Of a tiny model of a family, pruned from Python."""
    text = families.token_ids(160, 12).numpy()
    torch.manual_seed(0)
    config = families.configuration(family)
    config.max_position_embeddings = 1024
    model = families.randomised(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    result = saap.prune(model, calibration=text, **{**IN_MEMORY, **changes})
    keep = {name: list(units) for name, units in result.plan.keep.items()}
    return digest(dict(result.model.named_parameters()), [keep, list(result.plan.dropped_blocks)])


def command(*arguments: object, processes: int = 1) -> dict[str, Any]:
    """What a command prints as JSON."""
    start = [sys.executable, "-m", "saap"]
    if processes > 1:
        start = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", str(processes), "-m", "saap"]
    done = subprocess.run([*start, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arguments}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout))


def of_folder(folder: Path) -> dict[str, str]:
    """Of every checkpoint in a folder, by its name."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        plan = file.parent / "saap" / "plan.json"
        if file.parent.name != "saap":
            keep = json.loads(plan.read_text())["groups"] if plan.exists() else None
            found[file.parent.name] = digest(load_file(file), keep)
    return found


def cases(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names, and what gives the digest of each. folder: for what is written."""
    for family in MANY:
        yield f"{family}, adaptive", partial(in_memory, family, {})
    for family in ("llama", "qwen3", "gemma2"):
        yield f"{family}, uniform, ffn", partial(in_memory, family, {"layout": "uniform", "roles": ("ffn",)})
    yield "mixtral, expert", partial(in_memory, "mixtral", {"roles": ("expert",)})
    for name, changes in LLAMA.items():
        yield f"llama, {name}", partial(in_memory, "llama", changes)
    source, text = tiny.folder(folder / "dense"), tiny.text_file(folder / "text.txt")
    for name, flags in WRITTEN.items():
        given = [str(text) if flag == "TEXT" else flag for flag in flags]
        if not any(flag in given for flag in ("--pruning-ratio", "--target-params")):
            given += ["--pruning-ratio", "0.2"]
        yield f"written, {name}", partial(pruned, folder / name, source, *given)
    given = ["--pruning-ratio", "0.2", *FAST]
    yield "written, two processes", partial(pruned, folder / "several", source, *given, processes=2)
    small = folder / "default text"
    groups = ["--group-size", "16"]
    full = ["--tuning", "full"]
    kinds = {
        "groupwise": groups, "feedback": [*groups, "--error-feedback"], "lora": ["--tuning", "lora"], "full": full,
        "on-policy": [*full, "--on-policy", "1"], "teacher logits": [*full, "--teacher-logits", folder / "logits"],
    }  # fmt: skip
    short = ["--max-steps", "3", "--max-seq-length", "64", "--learning-rate", "0.001"]
    for name, flags in kinds.items():
        tuning = ["--data", text, *short, *flags]
        make = partial(pruned, small, source, *given)
        yield f"recovered, {name}", partial(recovered, make, small, folder / name, *tuning)
    yield "recovered, default text", partial(recovered, make, small, folder / "recovered on mixed", *short, *groups)
    yield "evaluated", partial(evaluated, small)
    yield "compared", partial(compared, source, folder / "compared")


def pruned(out: Path, *arguments: object, processes: int = 1) -> dict[str, str]:
    """Of what `saap prune` writes."""
    command("prune", *arguments, "--out", out, "--json", processes=processes)
    return of_folder(out)


def recovered(make_small: Callable[[], Any], small: Path, out: Path, *arguments: object) -> list[Any]:
    """Of what `saap recover` writes and measures. make_small: writes the pruned model, unless another case has."""
    if not small.exists():
        make_small()
    report = command("recover", small, "--out", out, "--json", *arguments)
    return [of_folder(out), report["perplexity"]]


def evaluated(small: Path) -> list[Any]:
    """What `saap eval` measures."""
    report = command("eval", small, "--perplexity", "bundled", "--max-tokens", "4096", "--generation", "--json")
    return [report["perplexity"]["bundled"]["value"], report["generation"]["samples"]]


def compared(source: Path, out: Path) -> list[Any]:
    """Perplexities of what `saap compare` makes, cut only and reconstructed."""
    methods = ",".join(["saap", "llm-pruner-element2@ffn", "flap", "wanda-sp@ffn", "block-influence"])
    command("compare", source, "--methods", methods, "--pruning-ratio", "0.2", *FAST, "--out", out, "--json")
    rows = json.loads((out / "comparison.json").read_text())["rows"]
    return [[row["method"], row["restored"], row["perplexity"]["bundled"]["value"]] for row in rows]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--record", action="store_true")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="cases whose name contains it; `evaluated` needs `written`"
    )
    given = parser.parse_args()
    if given.record and (given.only or given.compare is None):
        parser.error("--record needs --compare and all cases")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    parts = {part for one in EXPERIMENTS for part in one.decided_by if not part.startswith(NOT_RUN)}
    code = digests(sorted(parts))
    before = json.loads(given.compare.read_text()) if given.compare is not None else {"cases": {}}
    expected = before["cases"]
    found: dict[str, Any] = {}
    differing = []
    with tempfile.TemporaryDirectory() as folder:
        for name, case in cases(Path(folder)):
            if given.only not in name:
                continue
            found[name] = value = case()
            if given.compare is not None and expected.get(name) != value:
                differing.append(name)
                print(f"differs: {name}", flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps({"code": code, "cases": found}, indent=1) + "\n")
    print(f"{len(found)} cases, {len(differing)} differ")
    if given.record and not differing and found.keys() == expected.keys():
        record_equal(before["code"], code)
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
