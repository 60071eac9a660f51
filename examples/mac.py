"""Prune and tune on the GPU of a Mac; elsewhere on the best device there is.

python examples/mac.py Qwen/Qwen3-0.6B -o small
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import saap


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output-dir", type=Path, required=True)
    parser.add_argument("--pruning-ratio", type=float, default=0.2)
    parser.add_argument("--preset", default="default")
    parser.add_argument("--max-minutes", type=float, default=20)
    given = parser.parse_args(argv)

    device = "mps" if torch.backends.mps.is_available() else "auto"
    pruned = given.output_dir / "pruned"
    saap.prune(given.model, pruning_ratio=given.pruning_ratio, preset=given.preset, device=device, output_dir=pruned)
    # The memory of a Mac is shared between processor and GPU: one short sequence a step leaves room for other programs.
    result = saap.recover(
        pruned,
        max_seq_length=256,
        batch_size=1,
        max_minutes=given.max_minutes,
        device=device,
        output_dir=given.output_dir / "tuned",
    )  # fmt: skip
    print(f"perplexity {result.report.perplexity_before:.2f} -> {result.report.perplexity:.2f}")


if __name__ == "__main__":
    main()
