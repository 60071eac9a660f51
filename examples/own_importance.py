"""Rank units by an importance of your own, and prune by the plan that follows from it.

    python examples/own_importance.py HuggingFaceTB/SmolLM2-135M -o small

The stages of a run are functions: discover, estimate, search; `prune` carries a plan out and reconstructs.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import saap
from saap.core.storage import write_plan


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output-dir", type=Path, required=True)
    parser.add_argument("--pruning-ratio", type=float, default=0.2)
    parser.add_argument("--preset", default="default")
    given = parser.parse_args(argv)

    graph = saap.discover(given.model)
    scores = saap.estimate(given.model, graph, "mixed", importance="element2")
    # The geometric mean of both granularities, in place of their fusion by uncertainty.
    own = {
        name: dataclasses.replace(group, element=np.sqrt(group.vector * group.element))
        for name, group in scores.groups.items()
    }
    plan = saap.search(
        graph, dataclasses.replace(scores, groups=own), pruning_ratio=given.pruning_ratio, importance="element2"
    )
    given.output_dir.parent.mkdir(parents=True, exist_ok=True)
    file = given.output_dir.with_suffix(".plan.json")
    write_plan(file, plan, graph)
    result = saap.prune(given.model, plan=file, preset=given.preset, output_dir=given.output_dir)
    print(f"{result.report.pruning_ratio:.1%} of the decoder blocks removed by {file}")


if __name__ == "__main__":
    main()
