"""The part of the default calibration that the dense model writes itself."""

from __future__ import annotations

import io

import numpy as np
import torch

from saap.core.storage import write_whole
from saap.pipeline.shared.context import Run
from saap.pipeline.shared.inputs import generated_sequences, write_refit_text
from saap.pipeline.shared.stages import WRITE_TEXT

HELD_WRITTEN = 4


def refit_tokens(run: Run) -> torch.Tensor:
    """Text for the restoration, with what the dense model wrote."""
    tokens = run.tokens.tensor("refit", run.device)
    written = _written(run)
    if written is not None:
        tokens = torch.cat([tokens, written[:-HELD_WRITTEN]])
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(run.config.seed))
    return tokens[order.to(tokens.device)]


def _written(run: Run) -> torch.Tensor | None:
    """What the model wrote, (sequences, length) in a random order; the last HELD_WRITTEN only evaluate structures."""
    saved = run.work.file(WRITE_TEXT.file)
    if not saved.exists():
        return None
    written = torch.from_numpy(np.load(saved, allow_pickle=False))
    order = torch.randperm(len(written), generator=torch.Generator().manual_seed(run.config.seed))
    return written[order].to(run.device)


def with_written(run: Run, name: str) -> torch.Tensor:
    """Half of the set of that name replaced by what the model wrote, where it wrote something."""
    tokens, written = run.tokens.tensor(name, run.device), _written(run)
    if written is None:
        return tokens
    part = written[-HELD_WRITTEN:] if name == "held" else written[:-HELD_WRITTEN]
    leading = part[:1, : len(run.tokens.leading)]
    size = tokens.shape[1] - leading.shape[1]
    body = part[:, leading.shape[1] :]
    pieces = body[:, : body.shape[1] // size * size].reshape(-1, size)
    pieces = torch.cat([leading.expand(len(pieces), -1), pieces], dim=1)
    half = min(len(tokens) // 2, len(pieces))
    chosen = torch.linspace(0, len(pieces) - 1, half).long().to(pieces.device)
    return torch.cat([tokens[half:], pieces[chosen]])


def write_text(run: Run) -> None:
    """Let the dense model write its part of the refit text, once; of several processes in the first."""
    if generated_sequences(run.loaded, run.config):
        run.processes.broadcast_result(lambda: _write_missing_text(run))


def _write_missing_text(run: Run) -> None:
    if run.work.file(WRITE_TEXT.file).exists():
        return
    with run.meter.stage(WRITE_TEXT):
        content = io.BytesIO()
        np.save(content, write_refit_text(run.loaded, run.config, run.meter.reporter.advance), allow_pickle=False)
        write_whole(run.work.file(WRITE_TEXT.file), content.getvalue())
