"""Pruned vocabularies: what fewer tokens cost in the languages that were kept, and in the others."""

import email
import logging
import unittest
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

from harness.charts import bars
from harness.digests import PRUNING
from harness.experiment import Cells, Figures, Measured, Names, Request, Scaled, Values
from lab.dense import source_of
from lab.texts import DATA, TEXTS
from lab.training import trained_folder

from saap.data.samples import leading_ids, token_stream
from saap.data.texts import read_documents
from saap.evaluation.perplexity import perplexities
from saap.pipeline.prune.vocabulary import checked_tokens, cut_to, tokens_to_keep
from saap.pipeline.shared.inputs import LoadedModel, RunOptions, open_model
from saap.settings.prune import PruneConfig
from saap.settings.vocabulary import Language

GEMMA, CODER = "gemma-3-270m", "qwen2.5-coder-0.5b"
ENGLISH, FRENCH = "en,code", "en,code,fr"
WHOLE = "all"
PYTHON: Sequence[ModuleType] = (email, logging, unittest)
"""Packages of the standard library whose source is the text `python`: no bundled text has any of it."""
SETTINGS = {
    "cells": Scaled(
        [["llama", ENGLISH, 1024]],
        [
            [GEMMA, ENGLISH, 102912], [GEMMA, FRENCH, 102912], [GEMMA, ENGLISH, 52672], [CODER, ENGLISH, 109504],
        ],
    ),
    "texts": Scaled(["novel"], ["wikitext2", "novel", "python", "french"]), "passages": Scaled(1, 16),
    "window": Scaled(128, 512),
}  # fmt: skip
DECIDED_BY = (*PRUNING, "vocabulary")


def cells(request: Request) -> Names:
    wanted = request.settings["cells"]
    dense = dict.fromkeys(f"{model}/{WHOLE}" for model, _, _ in wanted)
    return [*dense, *(f"{model}/{languages}/{size}" for model, languages, size in wanted)]


def measure(request: Request, wanted: Names) -> Measured:
    """The dense model and the pruned one read the same passages."""
    for model in dict.fromkeys(cell.partition("/")[0] for cell in wanted):
        # a smoke run uses a small model trained here
        source = str(trained_folder(request, model)) if request.quick else source_of(request, model)
        dense = replace(open_model(source, RunOptions(device="cpu")), owned=False)
        texts = read_texts(dense, request.settings)
        for cell in (cell for cell in wanted if cell.startswith(f"{model}/")):
            found: dict[str, Any] = {"dense_parameters": parameters(dense), "dense_rows": rows_of(dense)}
            pruned, started = dense, perf_counter()
            if not cell.endswith(f"/{WHOLE}"):
                _, languages, size = cell.split("/")
                chosen = tuple(map(Language, languages.split(",")))
                config = PruneConfig(vocabulary_size=int(size), languages=chosen)
                table = checked_tokens(dense, config.calibration)
                kept = tokens_to_keep(dense, config, table, config.languages, config.calibration)
                pruned = cut_to(dense, kept)
                found["seconds"] = perf_counter() - started
            found |= {"parameters": parameters(pruned), "rows": rows_of(pruned), "texts": {}}
            for name, text in texts.items():
                found["texts"][name] = read_by(pruned, text)
            yield cell, found


def read_texts(loaded: LoadedModel, chosen: Values) -> dict[str, list[str]]:
    """Passages of each text, evenly spread: the characters of as many tokens of the dense model as fit a window.

    Each model reads a passage as one window, so that both have the same characters before each.
    """
    tokenizer: Any = loaded.tokenizer
    size, passages = chosen["window"] - len(leading_ids(tokenizer)), chosen["passages"]
    found = {}
    for name in chosen["texts"]:
        whole = "\n\n".join(documents(name))
        ends = [end for _, end in tokenizer.backend_tokenizer.encode(whole, add_special_tokens=False).offsets]
        step = len(ends) // passages
        starts = [step * number for number in range(passages)]
        found[name] = [whole[ends[start] : ends[min(start + size, len(ends) - 1)]] for start in starts]
    return found


def documents(name: str) -> Sequence[str]:
    if name == "python":
        folders = [Path(str(package.__file__)).parent for package in PYTHON]
        return [file.read_text(encoding="utf-8") for folder in folders for file in sorted(folder.glob("*.py"))]
    if name == "french":
        return read_documents(DATA / "flores200" / "fra.evaluation.txt.gz")
    return read_documents(TEXTS[name])


def read_by(loaded: LoadedModel, passages: Sequence[str]) -> dict[str, Any]:
    """Tokens of the passages of a text, and nats per byte of a model in them."""
    ids = {str(place): token_stream([one], loaded.tokenizer) for place, one in enumerate(passages)}
    leading, size = leading_ids(loaded.tokenizer), sum(len(one.encode()) for one in passages)
    found = perplexities(loaded.model, ids, window=max(map(len, ids.values())) + len(leading), leading=leading)
    nats = sum(one.nll * one.tokens for one in found.values())
    return {"bytes": size, "tokens": sum(map(len, ids.values())), "nats_per_byte": nats / size}


def parameters(loaded: LoadedModel) -> int:
    return sum(one.numel() for one in loaded.model.parameters())


def rows_of(loaded: LoadedModel) -> int:
    model: Any = loaded.model
    return int(model.get_input_embeddings().weight.shape[0])


def summarise(cells: Cells) -> Values:
    rows = []
    for name, cell in cells.items():
        model, _, rest = name.partition("/")
        if rest == WHOLE:
            continue
        dense = cells[f"{model}/{WHOLE}"]["texts"]
        ratios = {text: one["nats_per_byte"] / dense[text]["nats_per_byte"] for text, one in cell["texts"].items()}
        longer = {text: one["tokens"] / dense[text]["tokens"] for text, one in cell["texts"].items()}
        kept = [text for text in ratios if text != "french" or "fr" in rest.split("/")[0].split(",")]
        rows.append(
            {
                "model": model, "languages": rest.split("/")[0], "rows": cell["rows"], "of": cell["dense_rows"],
                "share": cell["rows"] / cell["dense_rows"],
                "parameters": cell["parameters"] / cell["dense_parameters"], "ratios": ratios, "longer": longer,
                "worst": max(ratios[text] for text in kept), "seconds": cell["seconds"],
            }
        )  # fmt: skip
    return {"rows": rows, "texts": list(rows[0]["ratios"]), "slowest": max(row["seconds"] for row in rows)}


def figures(summary: Values) -> Figures:
    labels = [f"{row['model']}, {row['rows']:,}: {row['languages']}" for row in summary["rows"]]
    values = {text: [row["ratios"][text] for row in summary["rows"]] for text in summary["texts"]}
    return [bars("vocabulary", values, labels, x="bits per byte / dense")]
