"""Write a model as GGUF, a few rows at a time, with an Ollama Modelfile next to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from saap.core.errors import ExportError
from saap.core.files import whole_file
from saap.core.storage import write_whole
from saap.export.gguf.architectures import WriterFields
from saap.export.gguf.check import Agreement, check_in_llama_cpp
from saap.export.gguf.modelfile import modelfile
from saap.export.gguf.plan import GgufPlan, PlannedTensor
from saap.export.gguf.tokenizer import tokenizer_fields
from saap.export.placing import check_file
from saap.export.source import Exported, ExportSource, Progress
from saap.models.checkpoint.groupwise import PackedMatrices
from saap.models.checkpoint.safetensor_files import StoredTensors
from saap.models.loading.llama_cpp import llama_cpp_is_installed
from saap.settings.export import ExportRequest
from saap.settings.prune import GgufType

CHUNK_VALUES = 2**20


class GgufExport(Exported):
    """A written GGUF file.

    architecture: llama.cpp's. tokenizer: origin of its tokenizer. agreement: with the transformers model in float32,
    None if not checked. same_tokens: whether both tokenizers agree on the checked text. packed_matrices: number copied
    from the integers of `saap recover`; not_packed: why none was copied although there are such integers.
    """

    modelfile: Path
    bytes: int
    architecture: str
    quantization: str
    tokenizer: str
    agreement: Agreement | None = None
    same_tokens: bool | None = None
    packed_matrices: int = 0
    not_packed: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The export as JSON-able data."""
        found = self.agreement
        return {
            **self.model_dump(mode="json", exclude={"notes", "agreement"}),
            "checked_tokens": None if found is None else found.tokens,
            "equal_predictions": None if found is None else found.share,
            "divergence": None if found is None else found.divergence,
        }


def write(
    source: ExportSource, out: Path, request: ExportRequest, *, overwrite: bool, progress: Progress
) -> GgufExport:
    """Write the file `out`, which exists only after it has passed the check, and a Modelfile.

    request.verify: open the file in llama.cpp and compare its logits on a text with those of transformers. With q4_1,
    the integers of a folder written by `saap recover` (4 bits, groups of 32) are copied exactly. Raises ExportError
    with the layers if llama.cpp cannot compute the same, OutputError.
    """
    if request.verify and not llama_cpp_is_installed():
        raise ExportError(
            "Checking the file needs the package llama-cpp-py-sync",
            "Run pip install 'saap[gguf]', or use --no-verify",
        )
    kind = request.quantization
    packed = PackedMatrices(source.resolved.folder) if kind is GgufType.Q4_1 else None
    plan = GgufPlan(source.config, source.tensors.shapes, kind, packed.names if packed is not None else ())
    said: dict[str, Any] = dict(plan.fields)
    tokenizer, origin = tokenizer_fields(source, said["vocab_size"])
    check_file(out, plan.weight_bytes, overwrite=overwrite)
    agreement, same = None, None
    with whole_file(out, remedy="Choose another --out") as part:
        progress.stage(f"write {out.name}")
        base = None if source.manifest is None else source.manifest.base
        name = Path(source.resolved.source).name if base is None else f"{Path(base.source).name}, pruned"
        licence = [("license", base.licence)] if base is not None and base.licence is not None else []
        fields = [("type", "model"), ("name", name), *licence, *plan.fields, *tokenizer]
        write_gguf(part, plan, source.tensors, fields, packed, progress.advance)
        if request.verify:
            progress.stage("compare it in llama.cpp with transformers")
            agreement, same = check_in_llama_cpp(source, part, said["context_length"])
            if not agreement.share >= plan.least_agreement:
                raise ExportError(
                    f"In llama.cpp {out.name} predicts the same next token as transformers for only "
                    f"{agreement.share:.1%} of {agreement.tokens} tokens, so it is not kept",
                    "Report this model as a bug of saap",
                )
    ollama = out.with_name(f"{out.stem}.Modelfile")
    write_whole(ollama, modelfile(out, source.tokenizer, context=said["context_length"]).encode())
    done = GgufExport(
        path=out, modelfile=ollama, bytes=out.stat().st_size, architecture=plan.architecture, quantization=kind.value,
        tokenizer=origin, agreement=agreement, same_tokens=same,
        packed_matrices=sum(tensor.packed for tensor in plan.tensors),
        not_packed=None if packed is None else packed.refused,
    )  # fmt: skip
    return done.model_copy(update={"notes": tuple(_notes(done))})


def _notes(done: GgufExport) -> Iterator[str]:
    """Messages to the user."""
    size = f"{done.bytes / 1e6:,.1f} MB"
    yield f"{done.path}: {size}, {done.quantization}, architecture {done.architecture} of llama.cpp"
    yield f"tokenizer from {done.tokenizer}"
    if done.packed_matrices:
        yield f"{done.packed_matrices} matrices have exactly the integers and scales of `saap recover`"
    if done.not_packed is not None:
        yield f"look here: {done.not_packed}, which is not Q4_1, so the weights were quantised again"
    found = done.agreement
    if found is None:
        yield "not checked in llama.cpp"
    else:
        yield (
            f"checked in llama.cpp: the same next token as transformers for {found.share:.2%} of {found.tokens} "
            f"tokens, divergence {found.divergence:.1e} nats"
        )
    if done.same_tokens is False:
        yield "look here: llama.cpp and the model's own tokenizer split the checked text into different tokens"
    yield "run it with:"
    yield f"  llama-cli -m {done.path}"
    yield f"  ollama create {done.path.stem} -f {done.modelfile}"


def write_gguf(
    path: Path, plan: GgufPlan, tensors: StoredTensors, fields: WriterFields, packed: PackedMatrices | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:  # fmt: skip
    """Write the file with only a few rows and the tokenizer's fields in memory.

    fields: of name and licence, plan, and tokenizer. packed: source of the blocks that the plan copies.
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
            for chunk in _chunks(tensor, tensors, packed):
                chunk.tofile(file)
            writer.write_padding(file, tensor.nbytes)
            progress(done + 1, len(plan.tensors))
    finally:
        writer.close()


def _chunks(tensor: PlannedTensor, tensors: StoredTensors, packed: PackedMatrices | None) -> Iterator[NDArray[Any]]:
    """The bytes of one tensor, whole rows at a time."""
    if tensor.values is not None:
        yield np.asarray(tensor.values, dtype=np.float32)
        return
    count, unit = tensor.shape[0], tensor.head_rows or 1
    step = max(1, CHUNK_VALUES // int(np.prod(tensor.shape[1:])) // unit) * unit
    for first in range(0, count, step):
        last = min(first + step, count)
        values: NDArray[Any] = np.zeros((last - first, *tensor.shape[1:]), dtype=np.float32)
        if tensor.packed and tensor.source is not None and packed is not None:
            values = packed.rows(tensor.source, first, last).numpy()
        elif tensor.source is not None:
            values = tensors.read(tensor.source)[first:last].to("cpu", torch.float32).numpy()
        if tensor.head_rows:
            values = interleaved(values, tensor.head_rows)
        if tensor.offset:
            values = values + np.float32(tensor.offset)
        values = np.ascontiguousarray(values)
        yield values if tensor.packed else gguf.quantize(values, tensor.kind)


def interleaved(rows: NDArray[Any], head_rows: int) -> NDArray[Any]:
    """Reorder the rows of each head so that the two rows of a rotary pair, before half a head apart, are adjacent.

    rows: (heads * head_rows, ...).
    """
    shape = rows.shape
    return rows.reshape(-1, 2, head_rows // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
