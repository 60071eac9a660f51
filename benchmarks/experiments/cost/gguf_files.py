"""Agreement of GGUF files with their folders, and the memory of writing them."""

import tempfile
from pathlib import Path

import gguf
import torch
import transformers.models.llama.configuration_llama  # noqa: F401 - imported before memory is measured
from harness.digests import MAKING
from harness.experiment import Cells, Measured, Names, Request, Values
from lab.commands import in_own_process, made_by_saap, quickly_pruned
from lab.memory import Peak
from lab.texts import token_ids

import saap
import saap.export.gguf.tokenizer
import saap.export.gguf.write
from saap.export.gguf.check import compare_with_llama_cpp
from saap.models.loading.llama_cpp import LlamaCpp
from saap.pipeline.export.run import export_gguf

WINDOW = 256
FILES = {"adaptive": ("f16", 2000), "uniform": ("f16", 2000), "tuned": ("q4_1", 2048)}
"""Types and tokens by folder: pruned in both layouts, and the adaptive one tuned for four steps."""
CELLS = list(FILES)
SMOKE = False
DECIDED_BY = (*MAKING, "export/gguf")


def measure(request: Request, wanted: Names) -> Measured:
    for name in wanted:
        folder, (quantization, tokens) = quickly_pruned(request, name.replace("tuned", "adaptive"), "0.2"), FILES[name]
        if name == "tuned":
            folder = made_by_saap(request, name, "recover", folder, "--max-steps", 4)
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary) / "model.gguf"
            written = in_own_process(write, folder, file, quantization)
            yield name, {"quantization": quantization, **written, **agreement(folder, file, tokens)}


def write(folder: Path, out: Path, quantization: str) -> Values:
    """Write the file. over_largest_tensor: peak memory above the imports, over the largest tensor of the file."""
    with Peak() as peak:
        done = export_gguf(str(folder), str(out), quantization=quantization, verify=False)
    largest = max(int(tensor.n_bytes) for tensor in gguf.GGUFReader(done.path).tensors)
    return {"architecture": done.architecture, "over_largest_tensor": (peak.bytes - peak.before) / largest}


def agreement(folder: Path, file: Path, tokens: int) -> dict[str, float]:
    """llama.cpp (keys and values in float32, no flash attention) and transformers (float32) on WikiText-2 test."""
    ids = token_ids(folder, "wikitext2", tokens)
    model = saap.load(str(folder), device="cpu", dtype=torch.float32)
    with LlamaCpp(file, context=WINDOW, threads=torch.get_num_threads(), exact=True) as runtime:
        (found,) = compare_with_llama_cpp(model, [runtime], ids, window=WINDOW)
    return {
        "tokens": found.tokens, "same_next_token": found.share, "divergence": found.divergence,
        "perplexity_over_ours": found.perplexity_ratio,
    }  # fmt: skip


def summarise(cells: Cells) -> Values:
    least = min(cells[name]["same_next_token"] for name in FILES if name != "tuned")
    return {"rows": cells, "tuned": cells["tuned"], "least": least}
