"""Prune a code model on code, in the layout that vLLM opens like the dense model.

    python examples/code_model_for_vllm.py Qwen/Qwen2.5-Coder-1.5B --code src/**/*.py -o small-coder
    vllm serve small-coder

The uniform layout removes the same number of units from every layer, so any runtime that knows the family opens it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import saap


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output-dir", type=Path, required=True)
    parser.add_argument("--code", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--pruning-ratio", type=float, default=0.2)
    parser.add_argument("--preset", default="default")
    given = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as folder:
        calibration = Path(folder) / "code.jsonl"
        calibration.write_text("\n".join(json.dumps({"text": file.read_text()}) for file in given.code))
        result = saap.prune(
            given.model, pruning_ratio=given.pruning_ratio, preset=given.preset, layout="uniform",
            calibration=calibration, output_dir=given.output_dir,
        )  # fmt: skip
    print(f"{result.report.pruning_ratio:.1%} of the decoder blocks removed")


if __name__ == "__main__":
    main()
