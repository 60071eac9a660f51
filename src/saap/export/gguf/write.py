"""Writing a planned GGUF file, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from saap.core.errors import OutputError
from saap.export.gguf.fields import Field
from saap.export.gguf.plan import GgufPlan, PlannedTensor
from saap.export.placing import check_place
from saap.models.checkpoint.groupwise import PackedMatrices
from saap.models.checkpoint.safetensor_files import StoredTensors

CHUNK_VALUES = 2**20


def check_file(out: Path, needed_bytes: int, *, overwrite: bool) -> None:
    """Raise OutputError now if the file could not be written later."""
    if out.is_dir():
        raise OutputError(f"{out} is a folder", "Name the file to write, e.g. --out model.gguf")
    if out.exists() and not overwrite:
        raise OutputError(f"The file {out} exists", "Choose another --out, or use --overwrite")
    check_place(out, needed_bytes)


def write_gguf(
    path: Path,
    plan: GgufPlan,
    tensors: StoredTensors,
    fields: Sequence[Field],
    description: Sequence[tuple[str, Any]] = (),
    packed: PackedMatrices | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the file; memory holds a few rows and the tokenizer's fields.

    fields: of the tokenizer. description: further (method of GGUFWriter, argument) pairs: name, licence, origin.
    packed: where the blocks are that the plan copies.
    """
    writer = gguf.GGUFWriter(path, plan.architecture)
    try:
        for name, value in (*description, *plan.fields):
            getattr(writer, f"add_{name}")(value)
        for field in fields:
            writer.add_key_value(field.key, field.value, field.kind, field.element)
        for tensor in plan.tensors:
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.kind)
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), tensor.nbytes, raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
        for done, tensor in enumerate(plan.tensors):
            for chunk in _chunks(tensor, tensors, packed):
                chunk.tofile(file)
            writer.write_padding(file, tensor.nbytes)
            if progress is not None:
                progress(done + 1, len(plan.tensors))
    finally:
        writer.close()


def _chunks(tensor: PlannedTensor, tensors: StoredTensors, packed: PackedMatrices | None) -> Iterator[NDArray[Any]]:
    """The bytes of one tensor, whole rows at a time."""
    if tensor.values is not None:
        yield np.asarray(tensor.values, dtype=np.float32)
        return
    count = tensor.shape[0]
    step = max(1, CHUNK_VALUES // int(np.prod(tensor.shape[1:])))
    if tensor.head_rows:
        step = max(1, step // tensor.head_rows) * tensor.head_rows
    for first in range(0, count, step):
        last = min(first + step, count)
        if tensor.packed and tensor.source is not None and packed is not None:
            blocks = packed.rows(tensor.source, first, last).numpy()
            yield np.ascontiguousarray(interleaved(blocks, tensor.head_rows) if tensor.head_rows else blocks)
            continue
        if tensor.source is None:
            values = np.zeros((last - first, *tensor.shape[1:]), dtype=np.float32)
        else:
            values = tensors.read(tensor.source)[first:last].to("cpu", torch.float32).numpy()
        if tensor.head_rows:
            values = interleaved(values, tensor.head_rows)
        if tensor.offset:
            values = values + np.float32(tensor.offset)
        yield gguf.quantize(np.ascontiguousarray(values), tensor.kind)


def interleaved(rows: NDArray[Any], head_rows: int) -> NDArray[Any]:
    """Reorder the rows of each head so that the two of a rotary pair, half a head apart before, are neighbours.

    rows: (heads * head_rows, ...).
    """
    shape = rows.shape
    return rows.reshape(-1, 2, head_rows // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
