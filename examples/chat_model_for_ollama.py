"""Prune a chat model, tune it on conversations, and write it for Ollama.

    python examples/chat_model_for_ollama.py Qwen/Qwen2.5-0.5B-Instruct -o chat
    ollama create chat -f chat/model.Modelfile

Needs `pip install "saap[gguf]"`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import saap


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output-dir", type=Path, required=True)
    parser.add_argument("--pruning-ratio", type=float, default=0.2)
    parser.add_argument("--preset", default="default")
    parser.add_argument("--max-minutes", type=float, default=20)
    given = parser.parse_args(argv)

    pruned, tuned = given.output_dir / "pruned", given.output_dir / "tuned"
    # `mixed` calibrates on conversations as well; the chat template of the model is applied to them.
    # With one size for all layers the file has the family's own architecture, which Ollama knows.
    saap.prune(
        given.model,
        pruning_ratio=given.pruning_ratio,
        preset=given.preset,
        calibration="mixed",
        layout="uniform",
        output_dir=pruned,
    )
    # Groups of 32 with 4 bits are what q4_1 of llama.cpp holds: the tuned integers are copied as they are.
    saap.recover(pruned, data=["conversations"], group_size=32, bits=4, max_minutes=given.max_minutes, output_dir=tuned)
    written = saap.export_gguf(tuned, given.output_dir / "model.gguf", quantization="q4_1")
    print(f"{written.path}: {written.bytes / 1e6:.0f} MB, {written.modelfile}")


if __name__ == "__main__":
    main()
