"""What the types of llama.cpp's own quantiser cost a pruned model in perplexity, and save in bytes."""

import math
import tempfile
from pathlib import Path

import torch
from harness.digests import PRUNING
from harness.experiment import Cells, Measured, Names, Request, Values
from lab.commands import in_own_process, made_by_saap
from lab.dense import coder_model
from lab.texts import token_ids

from saap.models.checkpoint.gguf_files import read_header
from saap.models.loading.llama_cpp import LlamaCpp
from saap.pipeline.export.run import export_gguf

SMOLLM2, QWEN, LARGE = "smollm2", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"
WEIGHED = "+imatrix"
TYPES = ("f16", "q8_0", *(f"{kind}{how}" for kind in ("q4_k_m", "iq4_xs", "q5_k_m", "q6_k") for how in ("", WEIGHED)))
CELLS = [f"{SMOLLM2}/{kind}" for kind in TYPES]
EXTRA = [f"{model}/{kind}" for model in (QWEN, LARGE) for kind in TYPES]
SETTINGS = {
    "pruning ratio": 0.2, "alignment": 256, "preset": "fast", "refit tokens of the largest": 8192, "text": "wikitext2",
    "measured tokens": 4096, "window": 512,
}  # fmt: skip
SMOKE = False
DECIDED_BY = (*PRUNING, "export/gguf")


def measure(request: Request, wanted: Names) -> Measured:
    """Export the pruned and the dense model in each type; perplexity of the pruned one in llama.cpp."""
    settings = request.settings
    for cell in wanted:
        model, _, named = cell.partition("/")
        kind, weighed = named.removesuffix(WEIGHED), named.endswith(WEIGHED)
        source = request.model if model == SMOLLM2 else coder_model(request, model)
        flags = ["--pruning-ratio", settings["pruning ratio"], "--align", settings["alignment"]]
        flags += ["--preset", settings["preset"]]
        if model == LARGE:  # an hour less
            flags += ["--refit-tokens", settings["refit tokens of the largest"]]
        folder = made_by_saap(request, f"aligned-{model}", "prune", source, *flags)
        with tempfile.TemporaryDirectory() as temporary:
            pruned, dense = Path(temporary) / "pruned.gguf", request.work / f"dense-{model}-{kind}.gguf"
            values = in_own_process(written, folder, pruned, kind, weighed)
            if not dense.is_file():
                in_own_process(written, source, dense, kind, False)
            ids = token_ids(folder, settings["text"], settings["measured tokens"])
            yield (
                cell,
                {
                    **values,
                    "perplexity": perplexity_of(pruned, ids, settings["window"]),
                    "bytes": weight_bytes(pruned)[0] / weight_bytes(dense)[0],
                    "parameters": weight_bytes(pruned)[1] / weight_bytes(dense)[1],
                },
            )


def written(source: str | Path, out: Path, kind: str, weighed: bool) -> Values:
    """Write a file. fallback_bytes: more than if the blocks fitted every row; fallbacks: matrices concerned."""
    done = export_gguf(str(source), str(out), quantization=kind, imatrix=weighed, verify=False)
    found = done.fallbacks
    return {
        "architecture": done.architecture, "size": done.bytes,
        "fallbacks": sum(found.types.values()) if found is not None else 0,
        "fallback_bytes": found.extra_bytes if found is not None else 0,
    }  # fmt: skip


def perplexity_of(file: Path, ids: list[int], window: int) -> float:
    """Of the tokens but the first of each window."""
    total, predicted = 0.0, 0
    with LlamaCpp(file, context=window, threads=torch.get_num_threads()) as runtime:
        for first in range(0, len(ids), window):
            part = torch.tensor(ids[first : first + window])
            logits = torch.from_numpy(runtime.logits(part.tolist()))[:-1].double()
            total += float(torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum"))
            predicted += len(part) - 1
    return math.exp(total / predicted)


def weight_bytes(file: Path) -> tuple[int, int]:
    """Bytes of the file, and weights of its tensors."""
    return file.stat().st_size, sum(math.prod(shape) for _, shape, *_ in read_header(file).tensors)


def summarise(cells: Cells) -> Values:
    rows: dict[str, dict[str, Values]] = {}
    for cell, found in cells.items():
        model, _, kind = cell.partition("/")
        reference = cells.get(f"{model}/f16")
        if reference is not None:
            rows.setdefault(model, {})[kind] = {**found, "ratio": found["perplexity"] / reference["perplexity"]}
    return {"rows": rows, "first": rows[SMOLLM2]}
