"""llama.cpp: logits of a GGUF file at all positions, and its quantiser. Needs the package llama-cpp-py-sync."""

from __future__ import annotations

import functools
import importlib.util
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saap.core.errors import ModelError

_WARNING = 3  # ggml's log levels: 1 debug or 2 information below, 4 error above
_KEPT_LINES = 8
_FLOAT32 = 0  # ggml_type


def llama_cpp_is_installed() -> bool:
    """Whether `LlamaCpp` can be used; nothing is loaded."""
    return importlib.util.find_spec("llama_cpp_py_sync") is not None


@functools.cache
def _library() -> tuple[Any, Any, deque[str], Any]:
    """The library, its foreign function interface, its last log messages, and the callback that collects them."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    library, interface = get_lib(), get_ffi()
    complaints: deque[str] = deque(maxlen=_KEPT_LINES)

    def collect(level: int, text: Any, _: Any) -> None:
        if int(level) >= _WARNING:
            complaints.append(interface.string(text).decode(errors="replace").strip())

    callback = interface.callback("ggml_log_callback", collect)
    library.llama_log_set(callback, interface.NULL)
    library.llama_backend_init()
    return library, interface, complaints, callback


def quantize_file(
    source: Path, out: Path, file_type: int, *, importance: Mapping[str, NDArray[np.float32]], threads: int = 1
) -> None:
    """Write a GGUF file of type f16 again in another type, by llama.cpp's own quantiser.

    file_type: `llama_ftype`. importance: of a tensor's columns (inputs,), by its name in the file; may be empty.
    Raises ModelError with llama.cpp's message.
    """
    library, interface, complaints, _ = _library()
    complaints.clear()
    settings = library.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = file_type, threads
    matrix = interface.new("struct llama_model_imatrix_data[]", len(importance) + 1)  # ends with an empty name
    kept = []  # what the structures point to
    for entry, (name, values) in zip(matrix, importance.items(), strict=False):
        kept.append((interface.new("char[]", name.encode()), np.ascontiguousarray(values, dtype=np.float32)))
        entry.name, entry.size = kept[-1][0], values.size
        entry.data = interface.cast("float *", kept[-1][1].ctypes.data)
    if importance:
        settings.imatrix = matrix
    if library.llama_model_quantize(str(source).encode(), str(out).encode(), interface.addressof(settings)) != 0:
        reason = " ".join(complaints) or "without a message"
        raise ModelError(f"llama.cpp cannot quantise {source} ({reason})", "Use --quantization q8_0")


class LlamaCpp(ExitStack):
    """An open model with its own context; a context manager. vocabulary: number of tokens.

    exact: keep keys and values in float32 and use no flash attention, for comparisons. Raises ModelError with
    llama.cpp's message if it rejects the file.
    """

    def __init__(self, path: Path, *, context: int = 512, threads: int = 1, exact: bool = False) -> None:
        super().__init__()
        library, interface, complaints, _ = _library()
        self._library, self._interface = library, interface
        complaints.clear()
        settings = library.llama_model_default_params()
        settings.n_gpu_layers = 0
        model = library.llama_model_load_from_file(str(path).encode(), settings)
        if model == interface.NULL:
            reason = next((line for line in complaints if "error loading" in line), " ".join(complaints))
            raise ModelError(f"llama.cpp cannot open {path} ({reason})", "Report this model as a bug of the export")
        self.callback(library.llama_model_free, model)
        wanted = library.llama_context_default_params()
        wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = context
        wanted.n_seq_max = 1
        wanted.n_threads = wanted.n_threads_batch = threads
        if exact:
            wanted.type_k = wanted.type_v = _FLOAT32
            wanted.flash_attn_type = 0
        self._context = library.llama_init_from_model(model, wanted)
        if self._context == interface.NULL:
            self.close()
            raise ModelError(f"llama.cpp cannot run {path} ({' '.join(complaints)})", "Use a shorter context")
        self.callback(library.llama_free, self._context)
        self._vocabulary = library.llama_model_get_vocab(model)
        self.vocabulary = int(library.llama_vocab_n_tokens(self._vocabulary))

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids of a text; special tokens in it are parsed."""
        raw = text.encode()
        room = self._interface.new("llama_token[]", len(raw) + 8)
        found = self._library.llama_tokenize(self._vocabulary, raw, len(raw), room, len(raw) + 8, add_special, True)
        return [int(room[index]) for index in range(found)]

    def feed(self, ids: Sequence[int], *, start: int = 0, every_position: bool = False) -> NDArray[np.float32]:
        """Process tokens after `start` others. Returns logits (tokens, vocabulary), or only those of the last token."""
        if start == 0:
            self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        count = len(ids)
        batch = self._library.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for index, token in enumerate(ids):
                batch.token[index], batch.pos[index] = int(token), start + index
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
                batch.logits[index] = every_position or index == count - 1
            status = self._library.llama_decode(self._context, batch)
        finally:
            self._library.llama_batch_free(batch)
        if status != 0:
            raise ModelError(f"llama.cpp failed to read {count} tokens (code {status})", "Use a shorter context")
        rows = count if every_position else 1
        logits = self._library.llama_get_logits(self._context)
        size = rows * self.vocabulary * np.dtype(np.float32).itemsize
        values = np.frombuffer(self._interface.buffer(logits, size), dtype=np.float32)
        return values.reshape(rows, self.vocabulary).copy()

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits (tokens, vocabulary) of a text in an empty context."""
        return self.feed(ids, every_position=True)
