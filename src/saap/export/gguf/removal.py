"""Removal of whole experts from a GGUF file: what stays is copied byte for byte, so nothing is quantised again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import gguf

from saap.core.errors import ExportError, ModelError, listed
from saap.core.files import whole_file
from saap.models.checkpoint.gguf_files import GgufHeader, GgufTensor, read_header

COUNT = "expert_count"
_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.\w+")
# Modules whose outermost axis is that of the experts: their matrices, the router, and the bias of its choice.
_STACKED = re.compile(r"ffn_(gate|up|down|gate_up)_exps|ffn_gate_inp|exp_probs_b")
# Other modules of experts, of which nothing is known, and experts in tensors of their own (files of 2023).
_UNKNOWN = re.compile(r"\w*_(ch|sm)?exps|exp_\w+")
_ONE_BY_ONE = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.")
_COPIED_BYTES = 2**24


@dataclass(frozen=True)
class GgufExperts:
    """The experts of a GGUF file. count: in each layer. layers: by number, the tensors with an axis of experts."""

    path: Path
    header: GgufHeader
    count: int
    layers: Mapping[int, tuple[GgufTensor, ...]]

    @cached_property
    def _stacked(self) -> Mapping[str, int]:
        """The layer of each tensor with an axis of experts."""
        return {tensor.name: layer for layer, tensors in self.layers.items() for tensor in tensors}

    @property
    def type(self) -> str:
        """The type of most weights, e.g. `q4_k_m`."""
        try:
            kind: str = gguf.LlamaFileType(self.header.value("general.file_type")).name
        except ValueError:  # not said, or newer than the package
            return "gguf"
        return kind.removeprefix("MOSTLY_").removeprefix("ALL_").lower()

    def nbytes(self, keep: Mapping[int, Sequence[int]]) -> int:
        """Bytes of all tensors with the experts `keep` of each layer."""
        return self.header.nbytes - sum(
            tensor.nbytes // self.count * (self.count - len(keep[layer]))
            for layer, tensors in self.layers.items()
            for tensor in tensors
        )

    def write(
        self, out: Path, keep: Mapping[int, Sequence[int]],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:  # fmt: skip
        """Write the file again with the experts `keep` of each layer, atomically.

        Metadata and tensors are those of the source, byte for byte, but for the number of experts and what belongs to
        the others. Every layer keeps the same number. Raises OutputError.
        """
        (kept,) = {len(numbers) for numbers in keep.values()}
        with whole_file(out) as part, self.path.open("rb") as source, part.open("wb") as file:
            file.write(self._fields(source, kept))
            offset = 0
            for tensor in self.header.tensors:
                shape = (kept, *tensor.shape[1:]) if tensor.name in self._stacked else tensor.shape
                one = tensor._replace(shape=shape, offset=offset)
                file.write(_described(one))
                offset += one.nbytes + -one.nbytes % self.header.alignment
            self._pad(file)
            for done, tensor in enumerate(self.header.tensors, start=1):
                for start, count in self._pieces(tensor, keep):
                    source.seek(self.header.data_start + tensor.offset + start)
                    _copy(source, file, count)
                self._pad(file)
                progress(done, len(self.header.tensors))

    def _fields(self, source: BinaryIO, kept: int) -> bytes:
        """Everything before the list of tensors, with another number of experts."""
        source.seek(0)
        raw = bytearray(source.read(self.header.fields_end))
        place = self.header.places[f"{self.header.architecture}.{COUNT}"]
        raw[place] = kept.to_bytes(place.stop - place.start, "little")
        return bytes(raw)

    def _pieces(self, tensor: GgufTensor, keep: Mapping[int, Sequence[int]]) -> Iterator[tuple[int, int]]:
        """Start and bytes of each run of a tensor that stays."""
        layer = self._stacked.get(tensor.name)
        if layer is None:
            yield 0, tensor.nbytes
            return
        size = tensor.nbytes // self.count
        for _, run in groupby(enumerate(keep[layer]), key=lambda pair: pair[1] - pair[0]):
            experts = [expert for _, expert in run]
            yield experts[0] * size, len(experts) * size

    def _pad(self, file: BinaryIO) -> None:
        file.write(bytes(-file.tell() % self.header.alignment))


def open_experts(path: Path) -> GgufExperts:
    """Where the experts of a file are.

    Raises ModelError if it is damaged, ExportError if it has no experts that can be removed.
    """
    header = read_header(path)
    count = header.own(COUNT)
    if not isinstance(count, int) or count < 1:
        raise ExportError(
            f"{path} has no experts, and nothing else can be removed from a GGUF file", "Write a folder with -o DIR"
        )
    if int(header.value(gguf.Keys.Split.LLM_KV_SPLIT_COUNT) or 1) > 1:
        raise ExportError(f"{path} is one of several parts", "Join them with llama.cpp's llama-gguf-split --merge")
    layers: dict[int, tuple[GgufTensor, ...]] = {}
    strange = [tensor.name for tensor in header.tensors if _ONE_BY_ONE.match(tensor.name)]
    for tensor in header.tensors:
        found = _TENSOR.fullmatch(tensor.name)
        if found is not None and _STACKED.fullmatch(found[2]):
            layers[int(found[1])] = (*layers.get(int(found[1]), ()), tensor)
            strange += [] if _is_stack(tensor, count) else [tensor.name]
        elif found is not None and _UNKNOWN.fullmatch(found[2]):
            strange.append(tensor.name)
    if strange:
        problem = f"{path} stores experts in a way that saap does not know ({listed(strange, 4)})"
        raise ExportError(problem, "Convert the model again with a newer llama.cpp, or write a folder")
    return GgufExperts(path, header, count, layers)


def _is_stack(tensor: GgufTensor, count: int) -> bool:
    """Whether the outermost axis is that of the experts, and no block of quantised weights spans two of them."""
    block, _ = gguf.GGML_QUANT_SIZES[tensor.kind]
    return tensor.shape[0] == count and (len(tensor.shape) > 1 or int(block) == 1)


def _described(tensor: GgufTensor) -> bytes:
    """Its entry in the list of tensors."""
    name, sizes = tensor.name.encode(), tensor.shape[::-1]
    return b"".join(
        [
            len(name).to_bytes(8, "little"), name, len(sizes).to_bytes(4, "little"),
            *(size.to_bytes(8, "little") for size in sizes),
            int(tensor.kind).to_bytes(4, "little"), tensor.offset.to_bytes(8, "little"),
        ]
    )  # fmt: skip


def _copy(source: BinaryIO, file: BinaryIO, count: int) -> None:
    while count:
        chunk = source.read(min(count, _COPIED_BYTES))
        if not chunk:
            raise ModelError(f"{source.name} has become shorter", "Leave the file alone until the run has ended")
        file.write(chunk)
        count -= len(chunk)
