"""Remove whole experts of a mixture-of-experts model; the router forgets them as well.

python examples/experts.py allenai/OLMoE-1B-7B-0924 -o fewer-experts
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
    parser.add_argument("--pruning-ratio", type=float, default=0.25)
    parser.add_argument("--preset", default="default")
    given = parser.parse_args(argv)

    result = saap.prune(
        given.model, pruning_ratio=given.pruning_ratio, preset=given.preset, roles=["expert"], layout="uniform",
        output_dir=given.output_dir,
    )  # fmt: skip
    kept = {name: len(units) for name, units in result.plan.keep.items()}
    print("\n".join(f"{name}: {count} experts kept" for name, count in kept.items()))


if __name__ == "__main__":
    main()
