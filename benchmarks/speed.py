"""Prefill and decode tokens/s of dense and pruned models, in turns.

    python benchmarks/speed.py DENSE FOLDER [FOLDER ...] [--runtime transformers|llama.cpp] [--quantization f16]
        [--prompt-tokens 128] [--new-tokens 32] [--rounds 5] [--threads 2]

For llama.cpp each model is written as GGUF first; `over_bytes` is the decode speed-up over the ratio of the bytes of
the files, which is what each token reads. Medians of the rounds; run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch

import saap
from saap.data.samples import token_stream
from saap.data.texts import evaluation_text
from saap.evaluation.speed import LlamaCppRuntime, Runtime, TransformersRuntime, measure_speeds
from saap.models.llama_cpp import LlamaCpp
from saap.models.loading import load_tokenizer
from saap.models.references import resolve_model
from saap.pipeline.export import export_gguf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="the dense one first")
    parser.add_argument("--runtime", choices=["transformers", "llama.cpp"], default="llama.cpp")
    parser.add_argument("--quantization", default="f16")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    prompt = token_stream([evaluation_text()], load_tokenizer(resolve_model(given.models[0])))
    ids = prompt[: given.prompt_tokens].tolist()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runtimes: dict[str, Runtime] = {}
        sizes: dict[str, int] = {}
        for number, model in enumerate(given.models):
            if given.runtime == "transformers":
                opened = saap.load(model, device="cpu", dtype=torch.float32)
                runtimes[model] = TransformersRuntime(opened)
                sizes[model] = sum(parameter.numel() * parameter.element_size() for parameter in opened.parameters())
                continue
            file = folder / f"{number}.gguf"
            sizes[model] = export_gguf(model, file, quantization=given.quantization, verify=False).bytes
            context = given.prompt_tokens + given.new_tokens + 1
            runtimes[model] = LlamaCppRuntime(
                stack.enter_context(LlamaCpp(file, context=context, threads=given.threads))
            )
        speeds = measure_speeds(runtimes, ids, new_tokens=given.new_tokens, rounds=given.rounds)
    dense = given.models[0]
    for model, speed in speeds.items():
        faster, smaller = speed.decode / speeds[dense].decode, sizes[dense] / sizes[model]
        result = {
            "model": Path(model).name, "runtime": given.runtime, "threads": given.threads, "bytes": sizes[model],
            "prefill": round(speed.prefill, 1), "decode": round(speed.decode, 1), "rounds": speed.rounds,
            "decode_speedup": round(faster, 3), "bytes_ratio": round(smaller, 3),
            "over_bytes": round(faster / smaller, 3),
        }  # fmt: skip
        print(json.dumps(result))


if __name__ == "__main__":
    main()
