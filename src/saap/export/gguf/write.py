"""Write a model as GGUF, a few rows at a time, with an Ollama Modelfile next to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from saap.core.errors import ExportError
from saap.core.files import whole_file
from saap.core.storage import write_whole
from saap.export.gguf.check import WINDOW, Agreement, check_in_llama_cpp
from saap.export.gguf.fields import WriterFields
from saap.export.gguf.metadata import metadata_fields
from saap.export.gguf.modelfile import modelfile
from saap.export.gguf.plan import GgufPlan
from saap.export.gguf.quantize import fallbacks, importance_matrix, quantize, unquantized
from saap.export.gguf.result import GgufExport, notes
from saap.export.gguf.tensors import PlannedTensor
from saap.export.gguf.tokenizer import tokenizer_fields
from saap.export.placing import check_file
from saap.export.source import ExportSource, Progress
from saap.models.checkpoint.groupwise import PACKED_FILE, Q4_1_GROUP, GroupwiseWeight, q4_1_blocks, read_packed
from saap.models.checkpoint.safetensor_files import StoredTensors
from saap.settings.export import ExportRequest, GgufType

CHUNK_VALUES = 2**20


def write(
    source: ExportSource, out: Path, request: ExportRequest, *, overwrite: bool, progress: Progress
) -> GgufExport:
    """Write the file `out`, which exists only after it has passed the check, and a Modelfile.

    request.verify: open the file in llama.cpp and compare its logits on a text with those of transformers. With q4_1,
    the integers of a folder written by `saap recover` (4 bits, groups of 32) are copied exactly. Raises ExportError
    with the layers if llama.cpp cannot compute the same, OutputError.
    """
    kind, ollama = request.quantization, out.with_name(f"{out.stem}.Modelfile")
    check_file(ollama, 0, overwrite=overwrite)
    packed, not_packed = _q4_1_weights(source.resolved.folder) if kind is GgufType.Q4_1 else ({}, None)
    plan = GgufPlan(source.config, source.tensors.shapes, kind, packed)
    said: dict[str, Any] = dict(plan.fields)
    tokenizer, origin = tokenizer_fields(source, said["vocab_size"])
    check_file(out, plan.needed_bytes, overwrite=overwrite)
    fields, imatrix = [*metadata_fields(source), *plan.fields, *tokenizer], kind.made_by_llama_cpp and request.imatrix
    found: dict[str, Any] = {}
    with whole_file(out, remedy="Choose another -o") as part, unquantized(part, kind) as first:
        progress.stage(f"write {first.name.removeprefix('.').removesuffix('.part')}")
        write_gguf(first, plan, source.tensors, fields, packed, progress.advance)
        model = source.model() if request.verify or imatrix else None
        if kind.made_by_llama_cpp:
            importance = {}
            if imatrix:
                progress.stage("observe activations for the importance matrix")
                importance = importance_matrix(model, source.tokenizer, plan.tensors, said["context_length"])
            progress.stage(f"quantise to {kind} in llama.cpp")
            quantize(first, part, kind, importance)
            found["fallbacks"] = fallbacks(part, kind)
        if request.verify:
            progress.stage("compare it in llama.cpp with transformers")
            files = dict.fromkeys((first, part))
            tokens = min(said["context_length"], WINDOW), request.check_tokens
            checked, found["same_tokens"] = check_in_llama_cpp(model, source.tokenizer, tuple(files), *tokens)
            _require(checked[0], plan, out)
            found["agreement"] = checked[-1]
            if kind.made_by_llama_cpp:
                found["perplexity_over_f16"] = checked[-1].perplexity_ratio / checked[0].perplexity_ratio
    write_whole(ollama, modelfile(out, source.tokenizer, context=said["context_length"]).encode())
    done = GgufExport(
        path=out, modelfile=ollama, bytes=out.stat().st_size, architecture=plan.architecture, quantization=kind.value,
        tokenizer=origin, imatrix=imatrix, packed_matrices=sum(tensor.packed for tensor in plan.tensors),
        not_packed=not_packed, **found,
    )  # fmt: skip
    return done.model_copy(update={"notes": tuple(notes(done))})


def _q4_1_weights(folder: Path) -> tuple[dict[str, GroupwiseWeight], str | None]:
    """The packed weights of a folder that are Q4_1 already, by name, and why others are not."""
    found, refused = dict[str, GroupwiseWeight](), None
    packed = read_packed(folder) if (folder / "saap" / PACKED_FILE).is_file() else {}
    for path, weight in packed.items():
        if (weight.bits, weight.group_size) == (4, Q4_1_GROUP):
            found[f"{path}.weight"] = weight
        else:
            refused = f"{PACKED_FILE} has {weight.bits} bits in groups of {weight.group_size}"
    return found, refused


def _require(checked: Agreement, plan: GgufPlan, out: Path) -> None:
    """Raise ExportError for a file that computes something else; what llama.cpp quantises is checked before that."""
    if not checked.share >= plan.least_agreement:
        raise ExportError(
            f"In llama.cpp {out.name} predicts the same next token as transformers for only "
            f"{checked.share:.1%} of {checked.tokens} tokens, so it is not kept",
            "Report this model as a bug of saap",
        )


def write_gguf(
    path: Path, plan: GgufPlan, tensors: StoredTensors, fields: WriterFields,
    packed: Mapping[str, GroupwiseWeight] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:  # fmt: skip
    """Write the file with only a few rows and the tokenizer's fields in memory.

    fields: of name and licence, plan, and tokenizer. packed: weights whose blocks the plan copies, by name.
    """
    writer = gguf.GGUFWriter(path, plan.architecture)
    try:
        for method, *arguments in fields:
            getattr(writer, f"add_{method}")(*arguments)
        for tensor in plan.tensors:
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.kind)
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), tensor.nbytes, raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
        for done, tensor in enumerate(plan.tensors):
            for source in tensor.sources or (None,):
                for chunk in _chunks(source, tensor, tensors, packed or {}):
                    chunk.tofile(file)
            writer.write_padding(file, tensor.nbytes)
            progress(done + 1, len(plan.tensors))
    finally:
        writer.close()


def _chunks(
    source: str | None, tensor: PlannedTensor, tensors: StoredTensors, packed: Mapping[str, GroupwiseWeight]
) -> Iterator[NDArray[Any]]:
    """The bytes of one source of a tensor, whole rows at a time."""
    if tensor.values is not None:
        yield np.asarray(tensor.values, dtype=np.float32) * np.float32(tensor.factor)
        return
    shape = tensor.shape if source is None else tensors.shapes[source]
    count, unit = shape[0], tensor.head_rows or 1
    step = max(1, CHUNK_VALUES // int(np.prod(shape[1:])) // unit) * unit
    for first in range(0, count, step):
        last = min(first + step, count)
        values: NDArray[Any] = np.zeros((last - first, *shape[1:]), dtype=np.float32)
        if tensor.packed and source is not None:
            values = q4_1_blocks(packed[source], slice(first, last)).numpy()
        elif source is not None:
            values = tensors.read(source)[first:last].to("cpu", torch.float32).numpy()
        if tensor.part is not None:
            values = (values.swapaxes(1, 2) if tensor.part.transposed else values)[:, tensor.part.rows]
        if tensor.head_rows:
            values = interleaved(values, tensor.head_rows)
        if tensor.offset:
            values = values + np.float32(tensor.offset)
        if tensor.factor != 1.0:
            values = values * np.float32(tensor.factor)
        values = np.ascontiguousarray(values)
        yield values if tensor.packed else gguf.quantize(values, tensor.kind)


def interleaved(rows: NDArray[Any], head_rows: int) -> NDArray[Any]:
    """Reorder the rows of each head so that the two rows of a rotary pair, before half a head apart, are adjacent.

    rows: (heads * head_rows, ...).
    """
    shape = rows.shape
    return rows.reshape(-1, 2, head_rows // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
