"""Share pruning and tuning between the GPUs of one machine or several.

    torchrun --nproc-per-node 4 examples/several_gpus.py meta-llama/Llama-2-7b-hf -o small

Each process has a part of the samples and a whole copy of the model. A model that does not fit on one GPU is spread
over them by `device_map` in one process instead: `python examples/several_gpus.py MODEL -o small --device-map auto`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import saap


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output-dir", type=Path, required=True)
    parser.add_argument("--pruning-ratio", type=float, default=0.2)
    parser.add_argument("--preset", default="default")
    parser.add_argument("--device-map", choices=("auto", "balanced", "sequential"))
    parser.add_argument("--max-minutes", type=float, default=20)
    given = parser.parse_args(argv)

    pruned = given.output_dir / "pruned"
    saap.prune(
        given.model,
        pruning_ratio=given.pruning_ratio,
        preset=given.preset,
        device_map=given.device_map,
        output_dir=pruned,
    )
    # `shard` splits the frozen weights of the model and its teacher over the processes.
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    result = saap.recover(
        pruned,
        batch_size=processes,
        shard=processes > 1,
        max_minutes=given.max_minutes,
        output_dir=given.output_dir / "tuned",
    )
    if os.environ.get("RANK", "0") == "0":
        print(f"perplexity {result.report.perplexity_before:.2f} -> {result.report.perplexity:.2f}")


if __name__ == "__main__":
    main()
