"""The plan of a GGUF file: every field and tensor of it, checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import gguf

from saap.core.errors import ExportError
from saap.export.gguf.architectures import ALL_BIASES, ARCHITECTURES, PER_LAYER, Architecture
from saap.export.gguf.settings import Rope, faults, rope_of, sliding_window
from saap.models.checkpoint.safetensor_files import Shape

Kind = gguf.GGMLQuantizationType
_Q, _K, _V, _O = (f"self_attn.{name}_proj" for name in "qkvo")
_GATE, _UP, _DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
_BLOCK = "model.layers.{}."
_SUFFIXES = (".weight", ".bias")
# Module attributes that follow the sizes of the tensors, so that they need no field of their own.
_DERIVED = ("num_key_value_groups", "num_heads", "num_key_value_heads")
_EPSILONS = ("variance_epsilon", "eps", "epsilon")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How weights are stored: matrices as `matrices`, the embedding and the output as `vocabulary`, vectors as f32.

    file_type: llama.cpp's name for the whole. least_agreement: share of equal predictions below which a file is wrong.
    """

    matrices: Any
    vocabulary: Any
    file_type: Any
    least_agreement: float


QUANTIZATIONS: Mapping[str, Quantization] = {
    name: Quantization(
        # Four bits of the embedding cost more than they save; llama.cpp's own tool spares it too.
        matrices=Kind[name.upper()], vocabulary=Kind["Q8_0" if name.startswith("q4") else name.upper()],
        file_type=gguf.LlamaFileType["ALL_F32" if name == "f32" else f"MOSTLY_{name.upper()}"],
        least_agreement=least,
    )
    for name, least in (("f32", 0.98), ("f16", 0.95), ("bf16", 0.9), ("q8_0", 0.8), ("q4_0", 0.0), ("q4_1", 0.0))
}  # fmt: skip


# llama.cpp rounds the activations to 8 bits before it multiplies them with four-bit weights.
LEAST_OF_PACKED = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSizes:
    """Heads, KV heads and FFN channels of one layer as the file states them."""

    heads: int
    kv_heads: int
    ffn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """One tensor of the file.

    source: its name in transformers; None: zeros, or `values`. kind: its type in the file. head_rows: rows of a head
    that are to be interleaved, 0: none. offset: added to the values. packed: its blocks are there and are copied.
    """

    name: str
    source: str | None
    shape: Shape
    kind: Any
    head_rows: int = 0
    offset: float = 0.0
    packed: bool = False
    values: tuple[float, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file, without padding."""
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // int(block) * int(size)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufPlan:
    """A whole file. fields: (method of GGUFWriter, its argument), in order."""

    architecture: str
    blocks: tuple[BlockSizes, ...]
    fields: tuple[tuple[str, Any], ...]
    tensors: tuple[PlannedTensor, ...]
    quantization: Quantization

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that each token reads: all but the embedding, unless that is the output's weight too."""
        names = {tensor.name for tensor in self.tensors}
        looked_up = "token_embd.weight" if "output.weight" in names else ""
        return sum(tensor.nbytes for tensor in self.tensors if tensor.name != looked_up)


def plan_gguf(
    config: Any, shapes: Mapping[str, Shape], quantization: str, packed: Collection[str] = frozenset()
) -> GgufPlan:
    """Lay out a model as GGUF: as its own architecture if all layers are alike, else as `deci`.

    config: of transformers, also of an adaptive checkpoint. shapes: of the stored tensors. quantization: a key of
    QUANTIZATIONS. packed: weights that exist as blocks of that quantisation; the embedding of such a model keeps its 16
    bits, as when it was tuned. Raises ExportError, naming every layer at fault, if llama.cpp cannot compute the same.
    """
    model_type = getattr(config, "base_model_type", None) or config.model_type
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        raise ExportError(
            f"Models of type {model_type} cannot be written as GGUF by saap",
            f"Types that can: {', '.join(ARCHITECTURES)}; for a uniform layout use llama.cpp's own converter",
        )
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = faults(config, architecture, head_size)
    if found:
        raise ExportError(f"llama.cpp has no {model_type} with {'; '.join(found)}", "Use the folder with transformers")
    kinds = QUANTIZATIONS[quantization]
    if packed:
        kinds = replace(kinds, vocabulary=Kind.F16, least_agreement=LEAST_OF_PACKED)
    plan = _Plan(config, shapes, architecture, head_size, kinds, packed)
    return plan.finished(quantization)


class _Plan:
    """Collects fields and tensors, and every fault, of one file."""

    def __init__(
        self,
        config: Any,
        shapes: Mapping[str, Shape],
        architecture: Architecture,
        head_size: int,
        kinds: Quantization,
        packed: Collection[str],
    ) -> None:
        self.packed = packed
        self.config, self.shapes, self.head_size, self.kinds = config, shapes, head_size, kinds
        self.family = architecture
        self.layers: int = config.num_hidden_layers
        self.hidden = shapes["model.embed_tokens.weight"][1]
        stored = [self._stored_sizes(layer) for layer in range(self.layers)]
        self.added_biases = self._added_biases()
        self.per_layer = len(set(stored)) > 1 or 0 in (stored[0].heads, stored[0].ffn)
        self.per_layer |= bool(self.added_biases) and architecture.fits_per_layer
        self.name = PER_LAYER if self.per_layer else architecture.name
        self.blocks = tuple(self._written(layer, sizes) for layer, sizes in enumerate(stored))
        self.rope: Rope = rope_of(config, head_size)

    def finished(self, quantization: str) -> GgufPlan:
        self._check_layers()
        self._check_structure()
        tensors = self._tensors()
        _check_blocks(tensors, quantization)
        return GgufPlan(
            architecture=self.name,
            blocks=self.blocks,
            fields=tuple(self._fields()),
            tensors=tensors,
            quantization=self.kinds,
        )

    def _rows(self, layer: int, module: str) -> int:
        return self.shapes.get(f"{_BLOCK.format(layer)}{module}.weight", (0,))[0]

    def _stored_sizes(self, layer: int) -> BlockSizes:
        return BlockSizes(
            heads=self._rows(layer, _Q) // self.head_size,
            kv_heads=self._rows(layer, _K) // self.head_size,
            ffn=self._rows(layer, _GATE),
        )

    def _written(self, layer: int, sizes: BlockSizes) -> BlockSizes:
        """With the stand-ins that llama.cpp needs.

        It takes the head size from the first layer, so that one must have attention, and it forgets the attention of a
        layer without FFN. The stand-ins have zero output weights; a bias that such a module still has is kept.
        """
        block = _BLOCK.format(layer)
        heads, kv_heads, ffn = sizes.heads, sizes.kv_heads, sizes.ffn
        if not heads and (layer == 0 or f"{block}{_O}.bias" in self.shapes):
            heads = kv_heads = 1
        return BlockSizes(heads=heads, kv_heads=kv_heads, ffn=ffn or _stand_in_width(self.kinds))

    def _added_biases(self) -> list[str]:
        """Biases of the layers for which the architecture itself has no place."""
        places = {f"{_BLOCK.format(layer)}{module}.bias" for layer in range(self.layers) for module in ALL_BIASES}
        usual = tuple(f"{module}.bias" for module in self.family.biases)
        return [name for name in self.shapes if name in places and not name.endswith(usual)]

    def _check_layers(self) -> None:
        if self.added_biases and not self.per_layer:
            raise ExportError(
                f"llama.cpp's {self.family.name} has no place for the biases {_some(self.added_biases)}",
                "Prune with --restore, which makes up for what leaves without adding biases",
            )
        if self.per_layer and not self.family.fits_per_layer:
            usual = max(self.blocks, key=self.blocks.count)
            others = [str(layer) for layer, sizes in enumerate(self.blocks) if sizes != usual]
            raise ExportError(
                f"llama.cpp has no {self.family.name} whose layers differ (layers {_some(others)})",
                "Prune with --layout uniform",
            )
        uneven = [str(i) for i, b in enumerate(self.blocks) if b.heads and (not b.kv_heads or b.heads % b.kv_heads)]
        if uneven:
            raise ExportError(
                f"Query heads are no multiple of KV heads in the layers {_some(uneven)}", "Prune whole KV groups"
            )

    def _check_structure(self) -> None:
        """Refuse what an adaptive checkpoint changes besides its sizes and llama.cpp has no field for."""
        structure = getattr(self.config, "pruned_structure", None) or {}
        odd = sorted(structure.get("sliced_arguments", {}))
        odd += [
            f"{path}.{name}"
            for path, values in structure.get("attributes", {}).items()
            for name in values
            if name not in (*_EPSILONS, *_DERIVED)
        ]
        if odd:
            raise ExportError(f"llama.cpp cannot be told of {_some(odd)}", "Prune with --layout uniform")

    def _epsilon(self) -> float:
        changed: dict[str, float] = {
            path: float(value)
            for path, values in (getattr(self.config, "pruned_structure", None) or {}).get("attributes", {}).items()
            for name, value in values.items()
            if name in _EPSILONS
        }
        usual = float(self.config.rms_norm_eps)
        norms = [name for name in self.shapes if name.endswith("norm.weight")]
        epsilons = {changed.get(name.removesuffix(".weight"), usual) for name in norms}
        if len(epsilons) > 1:
            spread = f"{min(epsilons):.2e} to {max(epsilons):.2e}"
            raise ExportError(
                f"The norms have different epsilons, {spread} ({_some(list(changed))})",
                "Prune all of the hidden width or none of it",
            )
        return epsilons.pop()

    def _fields(self) -> list[tuple[str, Any]]:
        config = self.config
        window = sliding_window(config)
        context = int(config.max_position_embeddings)
        if window is not None and not self.family.window_period:
            context = min(context, window)  # up to here the sliding window hides nothing
        said: list[tuple[str, Any]] = [
            ("file_type", int(self.kinds.file_type)),
            ("quantization_version", gguf.GGML_QUANT_VERSION),
            ("vocab_size", self.shapes["model.embed_tokens.weight"][0]),
            ("context_length", context),
            ("embedding_length", self.hidden),
            ("block_count", self.layers),
            ("feed_forward_length", self._each(lambda sizes: sizes.ffn)),
            ("head_count", self._each(lambda sizes: sizes.heads)),
            ("head_count_kv", self._each(lambda sizes: sizes.kv_heads)),
            ("key_length", self.head_size),
            ("value_length", self.head_size),
            ("layer_norm_rms_eps", self._epsilon()),
            ("rope_dimension_count", self.head_size),
            ("rope_freq_base", self.rope.base),
        ]
        said += [
            (f"rope_scaling_{name}", gguf.RopeScalingType(value) if name == "type" else value)
            for name, value in self.rope.settings.items()
        ]
        if self.rope.local_base is not None:
            said.append(("rope_freq_base_swa", self.rope.local_base))
        if self.family.window_period and window is not None:
            said.append(("sliding_window", window))
        if self.family.soft_capped:
            said.append(("attn_logit_softcapping", float(config.attn_logit_softcapping)))
            said.append(("final_logit_softcapping", float(config.final_logit_softcapping)))
        return said

    def _each(self, size: Callable[[BlockSizes], int]) -> int | list[int]:
        sizes = [size(block) for block in self.blocks]
        return sizes if self.per_layer else sizes[0]

    def _tensors(self) -> tuple[PlannedTensor, ...]:
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        names = gguf.get_tensor_name_map(arch, self.layers)
        found, unknown = [], []
        factors = self.rope.factors
        if factors is not None:
            found.append(
                PlannedTensor(
                    name="rope_freqs.weight", source=None, shape=(len(factors),), kind=Kind.F32, values=factors
                )
            )
        tied = getattr(self.config, "tie_word_embeddings", False)
        for source, shape in self.shapes.items():
            if (source == "lm_head.weight" and tied) or self._is_left_out(source):
                continue
            name = names.get_name(source, _SUFFIXES)
            if name is None:
                unknown.append(source)
            else:
                found.append(self._tensor(name, source, shape))
        if unknown:
            raise ExportError(
                f"llama.cpp's {self.name} has no place for {_some(unknown)}", "Use the folder with transformers"
            )
        for layer, sizes in enumerate(self.blocks):
            found += [
                self._tensor(names.get_name(source, _SUFFIXES), None, shape)
                for source, shape in self._stand_ins(layer, sizes)
            ]
        return tuple(found)

    def _is_left_out(self, source: str) -> bool:
        """Whether it is the norm before a removed attention, which llama.cpp does not expect."""
        return any(
            not sizes.heads and source == f"{_BLOCK.format(layer)}input_layernorm.weight"
            for layer, sizes in enumerate(self.blocks)
        )

    def _stand_ins(self, layer: int, sizes: BlockSizes) -> list[tuple[str, Shape]]:
        block, width = _BLOCK.format(layer), self.head_size
        wanted: dict[str, Shape] = {_GATE: (sizes.ffn, self.hidden), _UP: (sizes.ffn, self.hidden)}
        wanted[_DOWN] = (self.hidden, sizes.ffn)
        if sizes.heads:
            wanted |= {_Q: (sizes.heads * width, self.hidden), _O: (self.hidden, sizes.heads * width)}
            wanted |= dict.fromkeys((_K, _V), (sizes.kv_heads * width, self.hidden))
        return [
            (f"{block}{module}.weight", shape)
            for module, shape in wanted.items()
            if f"{block}{module}.weight" not in self.shapes
        ]

    def _tensor(self, name: str, source: str | None, shape: Shape) -> PlannedTensor:
        vector = len(shape) == 1
        vocabulary = name in ("token_embd.weight", "output.weight")
        rotated = name.split(".")[-2] in ("attn_q", "attn_k") and source is not None
        return PlannedTensor(
            name=name,
            source=source,
            shape=shape,
            kind=Kind.F32 if vector else self.kinds.vocabulary if vocabulary else self.kinds.matrices,
            head_rows=self.head_size if rotated and (self.family.interleaved or self.per_layer) else 0,
            offset=self.family.norm_offset if name.endswith("norm.weight") else 0.0,
            packed=source in self.packed,
        )


def _stand_in_width(kinds: Quantization) -> int:
    """Channels of an FFN that stands for none: as few as the quantisation's blocks allow."""
    return int(gguf.GGML_QUANT_SIZES[kinds.matrices][0])


def _check_blocks(tensors: Sequence[PlannedTensor], quantization: str) -> None:
    wrong = [
        f"{tensor.source or tensor.name} ({tensor.shape[-1]})"
        for tensor in tensors
        if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[tensor.kind][0]
    ]
    if wrong:
        block = max(gguf.GGML_QUANT_SIZES[tensor.kind][0] for tensor in tensors)
        raise ExportError(
            f"{len(wrong)} tensors have an input size that the blocks of {quantization} ({block}) do not divide: "
            f"{_some(wrong)}",
            f"Prune with --align {block}, or use --quantization f16",
        )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
