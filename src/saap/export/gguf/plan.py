"""The plan of a GGUF file: every field and tensor of it, checked before anything is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import gguf

from saap.core.errors import ExportError
from saap.export.gguf.architectures import (
    ALL_BIASES,
    ARCHITECTURES,
    PER_LAYER,
    Architecture,
    WriterFields,
    faults,
    rope_fields,
    sliding_window,
)
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
    """A whole file, without what it says of the tokenizer."""

    architecture: str
    fields: WriterFields
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
    if model_type not in ARCHITECTURES:
        raise ExportError(
            f"Models of type {model_type} cannot be written as GGUF by saap",
            f"Types that can: {', '.join(ARCHITECTURES)}; for a uniform layout use llama.cpp's own converter",
        )
    kinds = QUANTIZATIONS[quantization]
    if packed:
        kinds = replace(kinds, vocabulary=Kind.F16, least_agreement=LEAST_OF_PACKED)
    planner = _Planner(config, shapes, ARCHITECTURES[model_type], kinds, packed)
    found = faults(config, planner.family, planner.head_size)
    if found:
        raise ExportError(f"llama.cpp has no {model_type} with {'; '.join(found)}", "Use the folder with transformers")
    planner.check()
    tensors = planner.tensors()
    _check_blocks(tensors, quantization)
    return GgufPlan(architecture=planner.name, fields=planner.fields(), tensors=tensors, quantization=kinds)


class _Planner:
    """Fields and tensors of one file."""

    def __init__(
        self,
        config: Any,
        shapes: Mapping[str, Shape],
        family: Architecture,
        kinds: Quantization,
        packed: Collection[str],
    ) -> None:
        self.config, self.shapes, self.family, self.kinds, self.packed = config, shapes, family, kinds, packed
        self.head_size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.rows, self.hidden = shapes["model.embed_tokens.weight"]
        self.changed: Mapping[str, Any] = getattr(config, "pruned_structure", None) or {}
        layers = range(config.num_hidden_layers)
        stored = [self._stored_sizes(_BLOCK.format(layer)) for layer in layers]
        places = {f"{_BLOCK.format(layer)}{module}.bias" for layer in layers for module in ALL_BIASES}
        usual = tuple(f"{module}.bias" for module in family.biases)
        self.added_biases = [name for name in shapes if name in places and not name.endswith(usual)]
        self.per_layer = len(set(stored)) > 1 or 0 in (stored[0].heads, stored[0].ffn)
        self.per_layer |= bool(self.added_biases) and family.fits_per_layer
        self.name = PER_LAYER if self.per_layer else family.name
        self.blocks = [self._with_stand_ins(layer, sizes) for layer, sizes in enumerate(stored)]

    def _stored_sizes(self, block: str) -> BlockSizes:
        heads, kv_heads, ffn = (self.shapes.get(f"{block}{module}.weight", (0,))[0] for module in (_Q, _K, _GATE))
        return BlockSizes(heads=heads // self.head_size, kv_heads=kv_heads // self.head_size, ffn=ffn)

    def _with_stand_ins(self, layer: int, sizes: BlockSizes) -> BlockSizes:
        """The sizes that llama.cpp needs.

        It takes the head size from the first layer, so that one must have attention, and it forgets the attention of a
        layer without FFN. The stand-ins have zero output weights; a bias that such a module still has is kept. An FFN
        that stands for none has as few channels as the quantisation's blocks allow.
        """
        heads, kv_heads = sizes.heads, sizes.kv_heads
        if not heads and (layer == 0 or f"{_BLOCK.format(layer)}{_O}.bias" in self.shapes):
            heads = kv_heads = 1
        ffn = sizes.ffn or int(gguf.GGML_QUANT_SIZES[self.kinds.matrices][0])
        return BlockSizes(heads=heads, kv_heads=kv_heads, ffn=ffn)

    def check(self) -> None:
        """Refuse what the architecture has no place or no field for. Raises ExportError."""
        usual = max(self.blocks, key=self.blocks.count)
        uneven = [b.heads > 0 and (not b.kv_heads or b.heads % b.kv_heads > 0) for b in self.blocks]
        # what an adaptive checkpoint changes besides its sizes
        changed = [*sorted(self.changed.get("sliced_arguments", {}))]
        for path, values in self.changed.get("attributes", {}).items():
            changed += [f"{path}.{name}" for name in values if name not in (*_EPSILONS, *_DERIVED)]
        if not self.per_layer:
            _refuse(
                self.added_biases,
                f"llama.cpp's {self.family.name} has no place for the biases {{}}",
                "Prune with --restore, which makes up for what leaves without adding biases",
            )
        elif not self.family.fits_per_layer:
            _refuse(
                [str(layer) for layer, sizes in enumerate(self.blocks) if sizes != usual],
                f"llama.cpp has no {self.family.name} whose layers differ (layers {{}})",
                "Prune with --layout uniform",
            )
        _refuse(
            [str(layer) for layer, is_uneven in enumerate(uneven) if is_uneven],
            "Query heads are no multiple of KV heads in the layers {}",
            "Prune whole KV groups",
        )
        _refuse(changed, "llama.cpp cannot be told of {}", "Prune with --layout uniform")

    def _epsilon(self) -> float:
        own: dict[str, float] = {
            path: float(value)
            for path, values in self.changed.get("attributes", {}).items()
            for name, value in values.items()
            if name in _EPSILONS
        }
        norms = [name.removesuffix(".weight") for name in self.shapes if name.endswith("norm.weight")]
        epsilons = {own.get(norm, float(self.config.rms_norm_eps)) for norm in norms}
        spread = f"{min(epsilons):.2e} to {max(epsilons):.2e}"
        _refuse(
            list(own) if len(epsilons) > 1 else [],
            f"The norms have different epsilons, {spread} ({{}})",
            "Prune all of the hidden width or none of it",
        )
        return epsilons.pop()

    def fields(self) -> WriterFields:
        """What the file says of the model. Raises ExportError for norms whose epsilons differ."""
        config, window = self.config, sliding_window(self.config)
        context = int(config.max_position_embeddings)
        if window is not None and not self.family.window_period:
            context = min(context, window)  # up to here the sliding window hides nothing
        sizes: dict[str, Any] = {
            "feed_forward_length": [block.ffn for block in self.blocks],
            "head_count": [block.heads for block in self.blocks],
            "head_count_kv": [block.kv_heads for block in self.blocks],
        }
        fields: WriterFields = [
            ("file_type", int(self.kinds.file_type)),
            ("quantization_version", gguf.GGML_QUANT_VERSION),
            ("vocab_size", self.rows),
            ("context_length", context),
            ("embedding_length", self.hidden),
            ("block_count", len(self.blocks)),
            *((name, each if self.per_layer else each[0]) for name, each in sizes.items()),
            ("key_length", self.head_size),
            ("value_length", self.head_size),
            ("layer_norm_rms_eps", self._epsilon()),
            *rope_fields(config, self.head_size)[0],
        ]
        if self.family.window_period and window is not None:
            fields.append(("sliding_window", window))
        if self.family.soft_capped:
            fields.append(("attn_logit_softcapping", float(config.attn_logit_softcapping)))
            fields.append(("final_logit_softcapping", float(config.final_logit_softcapping)))
        return fields

    def tensors(self) -> tuple[PlannedTensor, ...]:
        """All tensors of the file in order. Raises ExportError for those that the architecture has no place for."""
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        names = gguf.get_tensor_name_map(arch, len(self.blocks))
        # llama.cpp expects no norm before a removed attention
        left_out = {
            f"{_BLOCK.format(layer)}input_layernorm.weight" for layer, b in enumerate(self.blocks) if not b.heads
        }
        if getattr(self.config, "tie_word_embeddings", False):
            left_out.add("lm_head.weight")
        sources = {name: shape for name, shape in self.shapes.items() if name not in left_out}
        unknown = [source for source in sources if names.get_name(source, _SUFFIXES) is None]
        _refuse(unknown, f"llama.cpp's {self.name} has no place for {{}}", "Use the folder with transformers")
        factors = rope_fields(self.config, self.head_size)[1]
        found = []
        if factors is not None:
            found.append(
                PlannedTensor(
                    name="rope_freqs.weight", source=None, shape=(len(factors),), kind=Kind.F32, values=factors
                )
            )
        found += [self._tensor(names.get_name(name, _SUFFIXES), name, shape) for name, shape in sources.items()]
        for layer, sizes in enumerate(self.blocks):
            for module, shape in self._module_shapes(sizes).items():
                source = f"{_BLOCK.format(layer)}{module}.weight"
                if source not in self.shapes:
                    found.append(self._tensor(names.get_name(source, _SUFFIXES), None, shape))
        return tuple(found)

    def _module_shapes(self, sizes: BlockSizes) -> dict[str, Shape]:
        ffn, attention, kv = (sizes.ffn, self.hidden), sizes.heads * self.head_size, sizes.kv_heads * self.head_size
        shapes: dict[str, Shape] = {_GATE: ffn, _UP: ffn, _DOWN: ffn[::-1]}
        if sizes.heads:
            shapes |= {_Q: (attention, self.hidden), _O: (self.hidden, attention)}
            shapes |= dict.fromkeys((_K, _V), (kv, self.hidden))
        return shapes

    def _tensor(self, name: str, source: str | None, shape: Shape) -> PlannedTensor:
        vocabulary = name in ("token_embd.weight", "output.weight")
        rotated = name.split(".")[-2] in ("attn_q", "attn_k") and source is not None
        return PlannedTensor(
            name=name,
            source=source,
            shape=shape,
            kind=Kind.F32 if len(shape) == 1 else self.kinds.vocabulary if vocabulary else self.kinds.matrices,
            head_rows=self.head_size if rotated and (self.family.interleaved or self.per_layer) else 0,
            offset=self.family.norm_offset if name.endswith("norm.weight") else 0.0,
            packed=source in self.packed,
        )


def _check_blocks(tensors: Sequence[PlannedTensor], quantization: str) -> None:
    sizes = [int(gguf.GGML_QUANT_SIZES[tensor.kind][0]) for tensor in tensors]
    wrong = [
        f"{tensor.source or tensor.name} ({tensor.shape[-1]})"
        for tensor, size in zip(tensors, sizes, strict=True)
        if tensor.shape[-1] % size
    ]
    _refuse(
        wrong,
        f"{len(wrong)} tensors have an input size that the blocks of {quantization} ({max(sizes)}) do not divide: {{}}",
        f"Prune with --align {max(sizes)}, or use --quantization f16",
    )


def _refuse(offenders: Sequence[str], problem: str, remedy: str) -> None:
    """Raise ExportError if there are any; they stand at `{}` of the problem."""
    if offenders:
        more = f" and {len(offenders) - 8} more" if len(offenders) > 8 else ""
        raise ExportError(problem.format(", ".join(offenders[:8]) + more), remedy)
