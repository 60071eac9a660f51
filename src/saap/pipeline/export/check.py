"""Opening of a finished folder in other programs, noted in its manifest and model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from saap.core.errors import ModelError
from saap.core.manifest import Opening, read_manifest
from saap.export.consumers import PATH, Loading, open_in
from saap.export.huggingface import write_records
from saap.export.model_card import load_lines, opens_with_code
from saap.models.loading.references import read_config
from saap.pipeline.shared.progress import Reporter
from saap.settings.registry import Consumer


def check_in_consumers(folder: Path, consumers: Sequence[Consumer], reporter: Reporter) -> tuple[Opening, ...]:
    """Open a folder written by saap in each program, and record what happened in its manifest and model card.

    A program that fails changes nothing else. Raises ModelError for a folder without a manifest, ConfigurationError
    for a program that is not installed.
    """
    manifest, config = read_manifest(folder), read_config(folder)
    if manifest is None:
        raise ModelError(f"{folder} has no manifest", "Give a folder written by saap")
    *_, imports, model, tokenizer = load_lines(PATH, config, folder)
    loading = Loading(lines=(imports, model, tokenizer), needs_code=opens_with_code(config))
    opened = []
    for consumer in consumers:
        reporter.stage(f"open it in {consumer}")
        opened.append(open_in(consumer, folder, loading))
    write_records(folder, manifest.model_copy(update={"opened": tuple(opened)}))
    return tuple(opened)
