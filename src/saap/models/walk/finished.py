"""Finished blocks of a walk in a folder, from which an interrupted one resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as tensors_to_bytes

from saap.core.errors import StaleInputError
from saap.core.records import Digested, FloatArray
from saap.core.storage import write_whole
from saap.models.walk.spill import SPILLED, FileTensors, Piece, StoredSequence, Tensors

NAME = "finished.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FinishedBlocks(Digested):
    """State of a walk after some of its passes through a block.

    walk: digest of all that decides its result. steps: number of finished passes. streams: hidden states that later
    passes need, and last those between the blocks, or their gradients. state: of the observers, by name.
    """

    walk: str
    steps: int
    streams: tuple[StoredSequence, ...]
    state: Mapping[str, FloatArray]


def write_finished(
    folder: Path, walk: str, steps: int, streams: Sequence[Tensors], state: Mapping[str, FloatArray]
) -> None:
    """Record a walk after `steps` passes, and delete the files of streams that are not needed any more."""
    kept = tuple(one.stay() for one in streams if isinstance(one, FileTensors))
    found = FinishedBlocks(walk=walk, steps=steps, streams=kept, state=state)
    metadata = {"walk": walk, "steps": str(steps), "streams": json.dumps(kept), "digest": found.digest}
    arrays = {name: np.ascontiguousarray(one) for name, one in state.items()}
    write_whole(folder / NAME, tensors_to_bytes(arrays, metadata))
    _delete_others(folder, found)


def read_finished(folder: Path, walk: str) -> FinishedBlocks | None:
    """The record of a walk; None for none, or that of another one. Raises StaleInputError if it is damaged."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata()
            if header["walk"] != walk:
                return None
            streams = tuple(
                StoredSequence(name, tuple(Piece(at, size, tuple(shape), *of) for at, size, shape, *of in pieces))
                for name, pieces in json.loads(header["streams"])
            )
            state = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 - no mapping
        found = FinishedBlocks(walk=header["walk"], steps=int(header["steps"]), streams=streams, state=state)
        if found.digest != header["digest"] or any((folder / one.name).stat().st_size < one.end for one in streams):
            raise ValueError("it is incomplete")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise StaleInputError(f"{path} has no finished blocks ({error})", f"Delete {folder}") from None
    _delete_others(folder, found)
    return found


def forget_finished(folder: Path) -> None:
    """Delete the record of a walk; what it needs is left."""
    (folder / NAME).unlink(missing_ok=True)


def _delete_others(folder: Path, found: FinishedBlocks) -> None:
    needed = {one.name for one in found.streams}
    for path in folder.glob(f"*{SPILLED}"):
        if path.name not in needed:
            path.unlink(missing_ok=True)
