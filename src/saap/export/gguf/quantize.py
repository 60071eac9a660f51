"""Types that llama.cpp's own quantiser makes: importance matrix, and what became of each tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from saap.data.samples import calibration_set
from saap.data.texts import MIXED
from saap.export.gguf.tensors import PlannedTensor
from saap.models.checkpoint.gguf_files import read_header
from saap.models.loading.llama_cpp import quantize_file
from saap.models.walk.observer import hooked
from saap.settings.export import GGUF_BLOCK, GgufType

SAMPLES, LENGTH = 32, 512
_KIND = gguf.GGMLQuantizationType
# What llama.cpp stores where 256 does not divide a row, by what it would store otherwise.
_MEANT = {_KIND.IQ4_NL: _KIND.IQ4_XS, _KIND.Q5_0: _KIND.Q4_K, _KIND.Q5_1: _KIND.Q5_K, _KIND.Q8_0: _KIND.Q6_K}
_UNTOUCHED = (_KIND.F32, _KIND.I32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallbacks:
    """Matrices with rows that 256 does not divide: how many of each type, and the bytes that this costs.

    modules: their kinds, e.g. `ffn_down`, with the sizes of their rows.
    """

    types: Mapping[str, int]
    modules: Mapping[str, tuple[int, ...]]
    extra_bytes: int


@contextmanager
def unquantized(part: Path, kind: GgufType) -> Iterator[Path]:
    """Path of the file that saap writes: `part`, or a temporary one next to it for llama.cpp's quantiser."""
    if not kind.made_by_llama_cpp:
        yield part
        return
    first = part.with_suffix(".f16")
    try:
        yield first
    finally:
        with suppress(OSError):
            first.unlink(missing_ok=True)


def quantize(first: Path, out: Path, kind: GgufType, importance: Mapping[str, NDArray[np.float32]]) -> None:
    """Write the f16 file `first` as `kind`. importance: see `importance_matrix`. Raises ModelError."""
    file_type = int(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    quantize_file(first, out, file_type, importance=importance, threads=torch.get_num_threads())


@torch.no_grad()
def importance_matrix(
    model: Any, tokenizer: Any, tensors: Sequence[PlannedTensor], context: int
) -> dict[str, NDArray[np.float32]]:
    """Mean squared input of every linear module of the blocks, (inputs,), by its tensor in the file.

    Over bundled calibration text. llama.cpp weighs quantisation errors of a column by it. Raises CalibrationError.
    """
    samples = calibration_set(MIXED, tokenizer, samples=SAMPLES, length=min(LENGTH, context), seed=0)
    # queries, keys and values that are one tensor have the same inputs
    names = {tensor.sources[0]: tensor.name for tensor in tensors if len(tensor.shape) == 2 and tensor.sources}
    totals: dict[str, Tensor] = {}

    def observe(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        totals[name] = totals.get(name, 0) + inputs[0].flatten(0, -2).double().square().sum(0)

    hooks: dict[nn.Module, Callable[..., None]] = {
        module: partial(observe, names[f"{path}.weight"])
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{path}.weight" in names
    }
    with hooked(hooks, before=True):
        for row in samples.tokens:
            model.base_model(torch.as_tensor(row).unsqueeze(0), use_cache=False)
    return {name: (total / samples.tokens.size).float().numpy() for name, total in totals.items()}


def fallbacks(file: Path, kind: GgufType) -> Fallbacks:
    """What llama.cpp stored in other types since their blocks of 256 do not fit the rows."""
    main = _KIND[kind.upper().removesuffix("_M")]
    types: Counter[str] = Counter()
    modules: dict[str, set[int]] = {}
    extra = 0
    for name, shape, stored, _ in read_header(file).tensors:
        if len(shape) > 1 and shape[-1] % GGUF_BLOCK and stored not in _UNTOUCHED:
            types[stored.name.lower()] += 1
            modules.setdefault(name.split(".")[-2], set()).add(shape[-1])
            extra += round(prod(shape) * (_bytes_per_weight(stored) - _bytes_per_weight(_MEANT.get(stored, main))))
    sizes = {name: tuple(sorted(found)) for name, found in modules.items()}
    return Fallbacks(types=dict(types), modules=sizes, extra_bytes=extra)


def _bytes_per_weight(kind: Any) -> float:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return float(size / block)
