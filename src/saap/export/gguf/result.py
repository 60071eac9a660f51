"""The result of an export to GGUF, and what the user is told of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saap.export.gguf.check import Agreement
from saap.export.gguf.quantize import Fallbacks
from saap.export.source import Exported
from saap.settings.export import GGUF_BLOCK


class GgufExport(Exported):
    """A written GGUF file.

    architecture: llama.cpp's. tokenizer: origin of its tokenizer. agreement: with the transformers model in float32,
    None if not checked. perplexity_over_f16: on the checked text, of a type that llama.cpp's quantiser makes. imatrix:
    whether quantisation errors were weighed by activations. fallbacks: matrices that are stored in another type since
    256 does not divide their rows. same_tokens: whether both tokenizers agree on the checked text. packed_matrices:
    number copied from the integers of `saap recover`; not_packed: why none was copied although there are such integers.
    """

    modelfile: Path
    bytes: int
    architecture: str
    quantization: str
    tokenizer: str
    agreement: Agreement | None = None
    perplexity_over_f16: float | None = None
    imatrix: bool = False
    fallbacks: Fallbacks | None = None
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
            "perplexity_ratio": None if found is None else found.perplexity_ratio,
        }


def notes(done: GgufExport) -> Iterator[str]:
    """Messages to the user."""
    size = f"{done.bytes / 1e6:,.1f} MB"
    weighed = " with an importance matrix" if done.imatrix else ""
    yield f"{done.path}: {size}, {done.quantization}{weighed}, architecture {done.architecture} of llama.cpp"
    yield f"tokenizer from {done.tokenizer}"
    if done.packed_matrices:
        yield f"{done.packed_matrices} matrices have exactly the integers and scales of `saap recover`"
    if done.not_packed is not None:
        yield f"look here: {done.not_packed}, which is not Q4_1, so the weights were quantised again"
    if done.fallbacks is not None and done.fallbacks.types:
        yield _of_fallbacks(done.fallbacks)
    found = done.agreement
    if found is None:
        yield "not checked in llama.cpp"
    else:
        yield (
            f"checked in llama.cpp: the same next token as transformers for {found.share:.2%} of {found.tokens} "
            f"tokens, divergence {found.divergence:.1e} nats, perplexity {found.perplexity_ratio:.4f} times its own"
        )
    if done.perplexity_over_f16 is not None:
        yield f"perplexity {done.perplexity_over_f16:.4f} times that of the same file in f16"
    if done.same_tokens is False:
        yield "look here: llama.cpp and the model's own tokenizer split the checked text into different tokens"
    yield "run it with:"
    yield f"  llama-cli -m {done.path}"
    yield f"  ollama create {done.path.stem} -f {done.modelfile}"


def _of_fallbacks(found: Fallbacks) -> str:
    types = ", ".join(f"{count} as {kind}" for kind, count in sorted(found.types.items()))
    modules = ", ".join(
        f"{name} ({', '.join(map(str, sizes[:4]))}{', ...' * (len(sizes) > 4)})"
        for name, sizes in found.modules.items()
    )
    remedy = f"; prune with --align {GGUF_BLOCK} to avoid it in ffn_down" if "ffn_down" in found.modules else ""
    return (
        f"look here: {GGUF_BLOCK} does not divide the rows of {modules}, so llama.cpp stored {types}: "
        f"{found.extra_bytes / 1e6:,.1f} MB more{remedy}"
    )
