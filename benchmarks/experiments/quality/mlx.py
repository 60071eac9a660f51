"""Pruned models in MLX-LM: tiny ones of every family, and the real one, also tuned in four bits."""

import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

from harness.digests import MAKING
from harness.experiment import Cells, Measured, Names, Request, Values
from lab.commands import made_by_saap, quickly_pruned
from lab.texts import token_ids

from saap.pipeline.export.run import export_model
from saap.settings.export import ExportRequest
from saap.settings.registry import ExportFormat

FAMILIES = (
    "llama", "llama_tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma4", "phi", "phi3", "gpt2",
    "gpt_bigcode", "gpt_neox", "gptj", "olmo2", "granite", "starcoder2", "smollm3", "stablelm", "glm4", "cohere",
    "nemotron", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "olmo", "opt", "bloom", "falcon",
    "gpt_neo", "codegen", "mpt",
)  # fmt: skip
REAL = ("pruned", "tuned")
CELLS = (*FAMILIES, *REAL)
WINDOW, TOKENS, RATIO = 256, 2048, 0.2
UNKNOWN = "has no model of type"
SETTINGS = {"mlx-lm": "0.32.2", "mlx": "0.32.4", "dtype": "float32", "positions": WINDOW, "seed": 0}
OPTIONS = {"python": "PYTHON_WITH_MLX_LM"}
NEEDS = ("python",)
SMOKE = False
DECIDED_BY = (*MAKING, "export/mlx.py")


def models() -> Any:
    """The tests' tiny models and their worker; needs the root of the repository on PYTHONPATH."""
    return import_module("tests.export.mlx_models")


def measure(request: Request, wanted: Names) -> Measured:
    for name in wanted:
        values = real(request, name) if name in REAL else tiny(request, name)
        yield name, values


def tiny(request: Request, family: str) -> Values:
    """Share of equal next tokens by what was pruned: None if the family has nothing to prune so, or why not."""
    folders: dict[str, Path] = {}
    for what, case in models().PRUNED.items():
        out = request.work / "mlx-tiny" / case.name
        if models().pruned_folder(family, case, out) is not None:
            folders[what] = out
    pairs = {folder: folder for folder in folders.values()}
    found = models().agreements(pairs, models().token_ids(), request.given["python"])
    shutil.rmtree(request.work / "mlx-tiny")
    if any(isinstance(one, str) and UNKNOWN in one for one in found):
        return {"known": False}
    values = dict(zip(folders, found, strict=True))
    return {"known": True, "pruned": {what: values.get(what) for what in models().PRUNED}}


def real(request: Request, name: str) -> Values:
    folder = quickly_pruned(request, "adaptive", str(RATIO))
    if name == "tuned":
        folder = made_by_saap(request, name, "recover", folder, "--max-steps", 4)
    out = request.work / f"mlx-{name}"
    done = export_model(folder, out, ExportRequest(format=ExportFormat.MLX), overwrite=True)
    (share,) = models().agreements({out: folder}, windows(folder), request.given["python"])
    return {"same_next_token": share, "bytes": done.as_dict()["bytes"]}


def windows(folder: Path) -> list[list[int]]:
    """WikiText-2 test in windows of token ids."""
    ids = token_ids(folder, "wikitext2", TOKENS)
    return [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]


def summarise(cells: Cells) -> Values:
    families = {name: cell for name, cell in cells.items() if name not in REAL}
    known = {name: cell["pruned"] for name, cell in families.items() if cell["known"]}
    notes: dict[str, str] = {}  # why something is not opened -> its number on the page
    rows = {name: [shown(value, notes) for value in pruned.values()] for name, pruned in known.items()}
    exact = sum(pruned["FFN channels, KV groups"] == 1.0 for pruned in known.values())
    shares = [value for pruned in known.values() for value in pruned.values() if isinstance(value, float)]
    return {
        "what": list(next(iter(known.values()))), "rows": rows, "notes": {number: why for why, number in notes.items()},
        "unknown": [name for name, cell in families.items() if not cell["known"]], "known": len(known),
        "exact": exact, "least": min(shares), "opened": len(shares), "all_equal": sum(one == 1.0 for one in shares),
        "positions": WINDOW, "ratio": RATIO, "real": {name: cells[name] for name in REAL},
    }  # fmt: skip


def shown(value: float | str | None, notes: dict[str, str]) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return notes.setdefault(value, f"({len(notes) + 1})")
    return f"{value:.1%}"
