"""The table of families as text, from the results of the cases."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import transformers
from tests.conformance.cases import CASES, EXACT, adaptive, dense, fits, stock_tolerance, tolerance, uniform
from tests.families import EVERY

from saap.core.records import CoupledGroup, ModelGraph, Role

CHECKED = tuple(case for case in CASES if case.name in ("mixed", "query heads", "width"))
HEADER = """# Families

Made by `python scripts/family_table.py` with transformers {version}; do not edit. Each row is a tiny random model
(hidden size 48, 2 or 3 blocks, float64) that passed these checks.

- **FFN**, **attention**, **query**, **experts**, **hidden**: units in one block, or for hidden in the whole model.
  Attention counts KV groups with their query heads, query the heads inside each group; `4 x 40` means 40 channels in
  each of 4 experts, and `2 x 4` experts are two groups of four, of which one is selected first. The block is the last
  one, as the first ones of some mixtures are dense. A dash: none, or unsupported (see the notes).
- **cut = masked**: the model with units removed computes the same as the dense model with these units masked. Removed
  experts are masked by excluding them from routing.
- **adaptive**: a model with a different size in each layer has the same logits after saving and loading.
- **generation**: the loaded model generates the same tokens with and without a key-value cache.
- **uniform**: roles that the stock class can load with fewer units, the same number in each layer, with equal logits.

| family | FFN | attention | query | experts | hidden | cut = masked | adaptive | generation | uniform |
|---|---|---|---|---|---|---|---|---|---|
"""


def document() -> str:
    """The whole page."""
    rows = "".join(_row(name) for name in EVERY)
    notes = "".join(f"- **{name}**: {'; '.join(found)}\n" for name in EVERY if (found := _notes(name)))
    version = ".".join(transformers.__version__.split(".")[:2])
    return f"{HEADER.format(version=version)}{rows}\n## What is unsupported, and why\n\n{notes}"


def _row(name: str) -> str:
    _, graph = dense(name)
    outcomes = [(case, adaptive(name, case)) for case in CHECKED if fits(name, case)]
    marks = (
        all(outcome.masked_error <= tolerance(name, case) for case, outcome in outcomes),
        all(outcome.saved_error <= EXACT and len(set(outcome.parameters)) == 1 for _, outcome in outcomes),
        all(outcome.cached_generation_agrees for _, outcome in outcomes),
    )
    stock = [
        str(role)
        for role in Role
        if (error := uniform(name, role).error) is not None and error <= stock_tolerance(role)
    ]
    units = [_units(graph, role) for role in Role]
    return f"| {' | '.join([name, *units, *('yes' if mark else 'NO' for mark in marks), ', '.join(stock) or '-'])} |\n"


def _units(graph: ModelGraph, role: Role) -> str:
    # The first blocks of some mixtures are dense.
    groups = [group for group in graph.of_role(role) if group.layer in (-1, len(graph.blocks) - 1)]
    return ", ".join(_bundles(groups)) or "-"


def _bundles(groups: Iterable[CoupledGroup]) -> list[str]:
    counts = Counter((group.bundle or group.name, group.units) for group in groups)
    return [f"{count} x {units}" if count > 1 else str(units) for (_, units), count in counts.items()]


def _notes(name: str) -> list[str]:
    _, graph = dense(name)
    notes = [f"{_anywhere(refusal.name)}: {_anywhere(refusal.reason)}" for refusal in graph.refused]
    for role in Role:
        found = uniform(name, role)
        if graph.of_role(role) and found.error is None:
            notes.append(f"uniform {role}: {re.sub(r' .logits differ by .*?.$', '', found.refusal.partition('. ')[0])}")
    return list(dict.fromkeys(notes))


def _anywhere(text: str) -> str:
    """The text with the number of any block as a star."""
    return re.sub(r"\.\d+\.", ".*.", text)
