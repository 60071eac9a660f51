"""How far a GGUF file of a folder computes the same as the folder, and what memory its writing takes.

    python benchmarks/gguf_files.py FOLDER [FOLDER ...] [--quantization f16] [--tokens 2000]

Agreement: share of positions of WikiText-2 test at which llama.cpp (keys and values in float32, no flash attention) and
transformers (float32) hold the same next token for the most likely, windows of 256, and the one's perplexity over the
other's on the same tokens. Memory: the greatest resident set
while the file is written, above that after the imports, over the largest tensor of the file; Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WIKITEXT2 = HERE / "data" / "wikitext2" / "test.jsonl.gz"
WINDOW = 256


def resident(field: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def write(folder: str, out: str, quantization: str) -> None:
    """Write the file and print what memory that took; runs in a process of its own."""
    import gguf
    import transformers.models.llama.configuration_llama  # noqa: F401

    import saap.export.gguf.tokenizer
    import saap.export.gguf.write  # noqa: F401
    from saap.pipeline.export.run import export_gguf

    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the greatest resident set of the imports
    done = export_gguf(folder, out, quantization=quantization, verify=False)
    above = resident("VmHWM") - before
    largest = max(int(tensor.n_bytes) for tensor in gguf.GGUFReader(done.path).tensors)
    print(json.dumps({"above_imports": above, "largest_tensor": largest, "architecture": done.architecture}))


def agreement(folder: str, file: Path, tokens: int) -> dict[str, float]:
    import torch

    import saap
    from saap.data.samples import token_stream
    from saap.data.texts import read_documents
    from saap.evaluation.agreement import compare_with_llama_cpp
    from saap.models.loading.llama_cpp import LlamaCpp
    from saap.models.loading.pretrained import load_tokenizer
    from saap.models.loading.references import resolve_model

    tokenizer = load_tokenizer(resolve_model(folder))
    ids = token_stream(read_documents(WIKITEXT2, tokenizer=tokenizer), tokenizer)[:tokens].tolist()
    model = saap.load(folder, device="cpu", dtype=torch.float32)
    with LlamaCpp(file, context=256, threads=torch.get_num_threads(), exact=True) as runtime:
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


def nll(logits: Any, ids: Any) -> float:
    """Sum of the negative log-likelihoods of all tokens but the first. logits: (tokens, vocabulary)."""
    import torch

    return float(torch.nn.functional.cross_entropy(logits[:-1].double(), ids[1:], reduction="sum"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--quantization", default="f16")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--write", metavar="FILE", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write:
        write(given.folders[0], given.write, given.quantization)
        return
    for folder in given.folders:
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary) / "model.gguf"
            command = [sys.executable, __file__, folder, "--quantization", given.quantization, "--write", str(file)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            memory = json.loads(done.stdout.splitlines()[-1])
            result = {
                "folder": Path(folder).name,
                "quantization": given.quantization,
                "architecture": memory["architecture"],
                **agreement(folder, file, given.tokens),
                "memory_above_imports_MB": round(memory["above_imports"] / 1e6, 1),
                "over_largest_tensor": round(memory["above_imports"] / memory["largest_tensor"], 2),
            }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
