"""How far a GGUF file of a folder computes the same as the folder, and what memory its writing takes."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers.models.llama.configuration_llama  # noqa: F401 - imported before memory is measured
from harness.experiment import Cells, Experiment, Measured, Request, Values
from lab.commands import in_own_process, made_by_saap, quickly_pruned
from lab.memory import Peak
from lab.texts import TEXTS

import saap
import saap.export.gguf.tokenizer
import saap.export.gguf.write
from saap.data.samples import token_stream
from saap.data.texts import read_documents
from saap.export.gguf.check import compare_with_llama_cpp
from saap.models.loading.llama_cpp import LlamaCpp
from saap.models.loading.pretrained import load_tokenizer
from saap.models.loading.references import resolve_model
from saap.pipeline.export.run import export_gguf

WINDOW = 256
FILES = {"adaptive": ("f16", 2000), "uniform": ("f16", 2000), "tuned": ("q4_1", 2048)}
"""Types and tokens by folder: pruned in both layouts, and the adaptive one tuned for four steps."""


def folder_of(request: Request, name: str) -> Path:
    if name != "tuned":
        return quickly_pruned(request, name, "0.2")
    source = quickly_pruned(request, "adaptive", "0.2")
    return made_by_saap(request, "tuned", ["recover", source, "--max-steps", "4"])


def measure(request: Request, wanted: Sequence[str]) -> Measured:
    for name in wanted:
        folder, (quantization, tokens) = folder_of(request, name), FILES[name]
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary) / "model.gguf"
            written = in_own_process(write, folder, file, quantization)
            yield name, {"quantization": quantization, **written, **agreement(folder, file, tokens)}


def write(folder: Path, out: Path, quantization: str) -> dict[str, Any]:
    """Write the file. over_largest_tensor: peak memory above the imports, over the largest tensor of the file."""
    with Peak() as peak:
        done = export_gguf(str(folder), str(out), quantization=quantization, verify=False)
    largest = max(int(tensor.n_bytes) for tensor in gguf.GGUFReader(done.path).tensors)
    return {"architecture": done.architecture, "over_largest_tensor": (peak.bytes - peak.before) / largest}


def agreement(folder: Path, file: Path, tokens: int) -> dict[str, float]:
    """llama.cpp (keys and values in float32, no flash attention) and transformers (float32) on WikiText-2 test.

    same_next_token: share of positions at which both hold the same token for the most likely. divergence: in nats.
    perplexity_over_ours: of llama.cpp over that of transformers.
    """
    tokenizer = load_tokenizer(resolve_model(str(folder)))
    ids = token_stream(read_documents(TEXTS["wikitext2"], tokenizer=tokenizer), tokenizer)[:tokens].tolist()
    model = saap.load(str(folder), device="cpu", dtype=torch.float32)
    with LlamaCpp(file, context=WINDOW, threads=torch.get_num_threads(), exact=True) as runtime:
        found = compare_with_llama_cpp(model, runtime, ids, window=WINDOW)
        ours = theirs = 0.0
        with torch.no_grad():
            for start in range(0, len(ids), WINDOW):
                part = torch.tensor(ids[start : start + WINDOW])
                ours += nll(model(part.unsqueeze(0)).logits[0], part)
                theirs += nll(torch.from_numpy(runtime.logits(part.tolist())), part)
    predicted = len(ids) - -(-len(ids) // WINDOW)
    return {
        "tokens": found.tokens, "same_next_token": found.share, "divergence": found.divergence,
        "perplexity_over_ours": math.exp((theirs - ours) / predicted),
    }  # fmt: skip


def nll(logits: torch.Tensor, ids: torch.Tensor) -> float:
    """Sum of the negative log-likelihoods of all tokens but the first. logits: (tokens, vocabulary)."""
    return float(torch.nn.functional.cross_entropy(logits[:-1].double(), ids[1:], reduction="sum"))


def summarise(cells: Cells) -> dict[str, Any]:
    rows: Values = {name: cells[name] for name in FILES}
    pruned = [row["same_next_token"] for name, row in rows.items() if name != "tuned"]
    return {"rows": rows, "tuned": rows["tuned"], "least": min(pruned)}


EXPERIMENT = Experiment(
    name="gguf-files", cells=lambda request: list(FILES), measure=measure, summarise=summarise, smoke=False
)
