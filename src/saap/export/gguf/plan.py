"""The plan of a GGUF file: all fields and tensors, checked before anything is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import gguf

from saap.core.errors import ExportError, listed
from saap.export.gguf.architectures import (
    ALL_BIASES,
    ARCHITECTURES,
    PER_LAYER,
    WriterFields,
    faults,
    rope_fields,
    sliding_window,
)
from saap.export.source import LayerSizes, head_size, layer_sizes
from saap.models.checkpoint.pruned_structure import EPSILON_NAMES
from saap.models.checkpoint.safetensor_files import Shape
from saap.settings.prune import GgufType

Kind = gguf.GGMLQuantizationType
_Q, _K, _V, _O = (f"self_attn.{name}_proj" for name in "qkvo")
_GATE, _UP, _DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
_BLOCK = "model.layers.{}."
_SUFFIXES = (".weight", ".bias")
# Module attributes that follow from tensor sizes, so they need no field.
_DERIVED = ("num_key_value_groups", "num_heads", "num_key_value_heads")
# Minimum share of equal predictions of a correct file; types not listed have no minimum.
LEAST_AGREEMENT = {"f32": 0.98, "f16": 0.95, "bf16": 0.9, "q8_0": 0.8}
# llama.cpp rounds activations to 8 bits before it multiplies them with four-bit weights.
LEAST_OF_PACKED = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """One tensor of the file.

    sources: the tensors of transformers that it holds, one after the other; none: zeros, or `values`. kind: its type in
    the file. head_rows: rows per head to interleave, 0: none. offset: added to the values. packed: its quantised blocks
    exist and are copied.
    """

    name: str
    sources: tuple[str, ...]
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

    @property
    def title(self) -> str:
        """Its name in messages."""
        return ", ".join(self.sources) or self.name


class GgufPlan:
    """GGUF layout of a model: its own architecture if all layers are alike, else `deci`; without the tokenizer.

    least_agreement: minimum share of predictions equal to those of transformers.
    """

    def __init__(
        self, config: Any, shapes: Mapping[str, Shape], quantization: GgufType, packed: Collection[str] = frozenset()
    ) -> None:
        """Plan every field and tensor.

        config: of transformers, also of an adaptive checkpoint. shapes: of the stored tensors. quantization: of the
        matrices, f16 for a type that llama.cpp's own quantiser makes; vectors are f32. packed: weights that exist as
        blocks of that quantisation; the embedding of such a model keeps its 16 bits, as when it was tuned. Raises
        ExportError with all unsupported layers if llama.cpp cannot compute the same.
        """
        model_type = getattr(config, "base_model_type", None) or config.model_type
        if model_type not in ARCHITECTURES:
            raise ExportError(
                f"Models of type {model_type} cannot be written as GGUF by saap",
                f"Types that can: {', '.join(ARCHITECTURES)}; for a uniform layout use llama.cpp's own converter",
            )
        family, self._head_size = ARCHITECTURES[model_type], head_size(config)
        if found := faults(config, family, self._head_size):
            problem = f"llama.cpp has no {model_type} with {'; '.join(found)}"
            raise ExportError(problem, "Use the folder with transformers")
        self._config, self._shapes, self._family, self._packed = config, shapes, family, packed
        if quantization.made_by_llama_cpp:
            quantization = GgufType.F16
        self._matrices = Kind[quantization.upper()]
        # A four-bit embedding costs more quality than it saves memory; llama.cpp's own tool skips it too.
        embedding = Kind.Q8_0 if quantization.startswith("q4") else self._matrices
        self._vocabulary = Kind.F16 if packed else embedding
        # changes of an adaptive checkpoint besides its sizes
        structure: Mapping[str, Any] = getattr(config, "pruned_structure", None) or {}
        self._sliced = sorted(structure.get("sliced_arguments", {}))
        attributes = structure.get("attributes", {}).items()
        self._attributes = [(path, *pair) for path, values in attributes for pair in values.items()]
        stored = layer_sizes(config, shapes)
        places = {f"{_BLOCK.format(layer)}{module}.bias" for layer in range(len(stored)) for module in ALL_BIASES}
        usual = tuple(f"{module}.bias" for module in family.biases)
        self._added_biases = [name for name in shapes if name in places and not name.endswith(usual)]
        self._per_layer = len(set(stored)) > 1 or 0 in (stored[0].heads, stored[0].ffn)
        self._per_layer |= bool(self._added_biases) and family.fits_per_layer
        self.architecture = PER_LAYER if self._per_layer else family.name
        self._blocks = [self._with_stand_ins(layer, sizes) for layer, sizes in enumerate(stored)]
        self._check()
        rope, factors = rope_fields(config, self._head_size)
        self.tensors = self._all_tensors(factors)
        self._check_blocks(quantization)
        self.fields = self._all_fields(quantization, rope)
        self.least_agreement = LEAST_OF_PACKED if packed else LEAST_AGREEMENT.get(quantization, 0.0)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def _with_stand_ins(self, layer: int, sizes: LayerSizes) -> LayerSizes:
        """The layer sizes to write.

        llama.cpp takes the head size from the first layer, so that layer must have attention. It also ignores the
        attention of a layer without FFN. Placeholders have zero output weights; a remaining bias of such a module is
        kept. A placeholder FFN has as few channels as the quantisation's blocks allow.
        """
        ffn, heads, kv_heads = sizes
        if not heads and (layer == 0 or f"{_BLOCK.format(layer)}{_O}.bias" in self._shapes):
            heads = kv_heads = 1
        return LayerSizes(ffn or int(gguf.GGML_QUANT_SIZES[self._matrices][0]), heads, kv_heads)

    def _check(self) -> None:
        """Reject tensors and settings that the architecture cannot express."""
        usual = max(self._blocks, key=self._blocks.count)
        layers = {str(layer): sizes for layer, sizes in enumerate(self._blocks)}
        uneven = [name for name, b in layers.items() if b.heads and (not b.kv_heads or b.heads % b.kv_heads)]
        known = (*EPSILON_NAMES, *_DERIVED)
        changed = [*self._sliced, *(f"{path}.{name}" for path, name, _ in self._attributes if name not in known)]
        if not self._per_layer:
            _refuse(
                self._added_biases,
                f"llama.cpp's {self._family.name} has no place for the biases {{}}",
                "Prune with --restore, which compensates for removed units without adding biases",
            )
        elif not self._family.fits_per_layer:
            _refuse(
                [name for name, sizes in layers.items() if sizes != usual],
                f"llama.cpp has no {self._family.name} whose layers differ (layers {{}})",
                "Prune with --layout uniform",
            )
        _refuse(uneven, "Query heads are no multiple of KV heads in the layers {}", "Prune whole KV groups")
        _refuse(changed, "llama.cpp has no field for {}", "Prune with --layout uniform")

    def _epsilon(self) -> float:
        """The epsilon of all norms."""
        own = {path: float(value) for path, name, value in self._attributes if name in EPSILON_NAMES}
        norms = [name.removesuffix(".weight") for name in self._shapes if name.endswith("norm.weight")]
        epsilons = {own.get(norm, float(self._config.rms_norm_eps)) for norm in norms}
        problem = f"The norms have different epsilons, {min(epsilons):.2e} to {max(epsilons):.2e} ({{}})"
        _refuse(list(own) if len(epsilons) > 1 else [], problem, "Prune all of the hidden width or none of it")
        return epsilons.pop()

    def _all_fields(self, quantization: str, rope: WriterFields) -> WriterFields:
        config, window = self._config, sliding_window(self._config)
        context = int(config.max_position_embeddings)
        if window is not None and not self._family.window_period:
            context = min(context, window)  # up to here the sliding window has no effect
        rows, hidden = self._shapes["model.embed_tokens.weight"]
        file_type = f"{'ALL' if quantization == 'f32' else 'MOSTLY'}_{quantization.upper()}"
        fields: WriterFields = [
            ("file_type", int(gguf.LlamaFileType[file_type])),
            ("quantization_version", gguf.GGML_QUANT_VERSION),
            ("vocab_size", rows),
            ("context_length", context),
            ("embedding_length", hidden),
            ("block_count", len(self._blocks)),
        ]
        for place, name in enumerate(("feed_forward_length", "head_count", "head_count_kv")):
            each = [block[place] for block in self._blocks]
            fields.append((name, each if self._per_layer else each[0]))
        fields += [("key_length", self._head_size), ("value_length", self._head_size)]
        fields += [("layer_norm_rms_eps", self._epsilon()), *rope]
        if self._family.window_period and window is not None:
            fields.append(("sliding_window", window))
        if self._family.soft_capped:
            fields.append(("attn_logit_softcapping", float(config.attn_logit_softcapping)))
            fields.append(("final_logit_softcapping", float(config.final_logit_softcapping)))
        return fields

    def _all_tensors(self, factors: tuple[float, ...] | None) -> list[PlannedTensor]:
        """All tensors in order. factors: of the frequencies of the rotary embedding."""
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        names = gguf.get_tensor_name_map(arch, len(self._blocks))
        # llama.cpp expects no norm before a removed attention
        left_out = {
            f"{_BLOCK.format(layer)}input_layernorm.weight" for layer, b in enumerate(self._blocks) if not b.heads
        }
        if getattr(self._config, "tie_word_embeddings", False):
            left_out.add("lm_head.weight")
        sources = {name: shape for name, shape in self._shapes.items() if name not in left_out}
        unknown = [source for source in sources if names.get_name(source, _SUFFIXES) is None]
        _refuse(unknown, f"llama.cpp's {self.architecture} has no place for {{}}", "Use the folder with transformers")
        found = []
        if factors is not None:
            shape: Shape = (len(factors),)
            found = [PlannedTensor(name="rope_freqs.weight", sources=(), shape=shape, kind=Kind.F32, values=factors)]
        found += [self._tensor(names.get_name(name, _SUFFIXES), (name,), shape) for name, shape in sources.items()]
        hidden = self._shapes["model.embed_tokens.weight"][1]
        for layer, sizes in enumerate(self._blocks):
            queries, keys = sizes.heads * self._head_size, sizes.kv_heads * self._head_size
            rows = {_GATE: sizes.ffn, _UP: sizes.ffn, _DOWN: hidden}
            if sizes.heads:
                rows |= {_Q: queries, _O: hidden, _K: keys, _V: keys}
            for module, count in rows.items():
                source = f"{_BLOCK.format(layer)}{module}.weight"
                if source not in self._shapes:
                    width = {_DOWN: sizes.ffn, _O: queries}.get(module, hidden)
                    found.append(self._tensor(names.get_name(source, _SUFFIXES), (), (count, width)))
        return found

    def _tensor(self, name: str, sources: tuple[str, ...], shape: Shape) -> PlannedTensor:
        vocabulary = name in ("token_embd.weight", "output.weight")
        rotated = name.split(".")[-2] in ("attn_q", "attn_k") and bool(sources)
        return PlannedTensor(
            name=name,
            sources=sources,
            shape=shape,
            kind=Kind.F32 if len(shape) == 1 else self._vocabulary if vocabulary else self._matrices,
            head_rows=self._head_size if rotated and (self._family.interleaved or self._per_layer) else 0,
            offset=self._family.norm_offset if name.endswith("norm.weight") else 0.0,
            packed=bool(sources) and all(source in self._packed for source in sources),
        )

    def _check_blocks(self, quantization: str) -> None:
        sizes = {tensor: int(gguf.GGML_QUANT_SIZES[tensor.kind][0]) for tensor in self.tensors}
        wrong = [f"{one.title} ({one.shape[-1]})" for one, size in sizes.items() if one.shape[-1] % size]
        block = max(sizes.values())
        _refuse(
            wrong,
            f"{len(wrong)} tensors have an input size that the blocks of {quantization} ({block}) do not divide: {{}}",
            f"Prune with --align {block}, or use --quantization f16",
        )


def _refuse(offenders: Sequence[str], problem: str, remedy: str) -> None:
    """Raise ExportError if there are offenders, which replace `{}` in the problem."""
    if offenders:
        raise ExportError(problem.format(listed(offenders, 8)), remedy)
