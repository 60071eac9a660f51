"""The plan of a GGUF file: all fields and tensors, checked before anything is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gguf

from saap.core.errors import ExportError, listed
from saap.export.gguf.architectures import ALL_BIASES, ARCHITECTURES
from saap.export.gguf.fields import (
    WriterFields,
    expert_fields,
    faults,
    faults_of_depth,
    head_fields,
    rope_fields,
    rope_of_windows,
    sliding_window,
)
from saap.export.gguf.norms import neutral_norms
from saap.export.gguf.tensors import Group, Names, PlannedTensor, grouped, joined
from saap.export.source import LayerSizes, head_size, layer_sizes
from saap.models.checkpoint.pruned_structure import EPSILON_NAMES
from saap.models.checkpoint.safetensor_files import Shape
from saap.settings.export import GgufType

Kind = gguf.GGMLQuantizationType
_Q, _K, _V, _O, _QKV = (f"self_attn.{name}_proj" for name in ("q", "k", "v", "o", "qkv"))
_QNORM, _KNORM = "self_attn.q_norm", "self_attn.k_norm"
_GATE, _UP, _DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
_BLOCK = "model.layers.{}."
_FREQUENCIES = "rotary_emb.inv_freq"
# Module attributes that follow from tensor sizes, so they need no field.
_DERIVED = ("num_key_value_groups", "num_heads", "num_key_value_heads", "num_experts", "num_local_experts")
# Minimum share of equal predictions of a correct file; types not listed have no minimum.
LEAST_AGREEMENT = {"f32": 0.98, "f16": 0.95, "bf16": 0.9, "q8_0": 0.8}
# llama.cpp rounds activations to 8 bits before it multiplies them with four-bit weights.
LEAST_OF_PACKED = 0.8


class GgufPlan:
    """GGUF layout of a model, without the tokenizer: its own architecture if all layers are alike.

    Otherwise that of its family for layers that differ. least_agreement: minimum share of predictions equal to those of
    transformers.
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
        family = ARCHITECTURES[model_type]
        self._head_size = config.qk_nope_head_dim + config.qk_rope_head_dim if family.latent else head_size(config)
        found, of_depth = faults(config, family, self._head_size), [*faults_of_depth(config, family, self._head_size)]
        if family.per_layer is None or not family.per_layer.windows:
            found += of_depth
        if found:
            problem = f"llama.cpp has no {model_type} with {'; '.join(found)}"
            raise ExportError(problem, "Use the folder with transformers")
        self._config, self._shapes, self._family, self._packed = config, shapes, family, packed
        self._copies = 1
        if quantization.made_by_llama_cpp:
            quantization, self._copies = GgufType.F16, 2
        self._matrices = Kind[quantization.upper()]
        # A four-bit embedding costs more quality than it saves memory; llama.cpp's own tool skips it too.
        embedding = Kind.Q8_0 if quantization.startswith("q4") else self._matrices
        self._vocabulary = Kind.F16 if packed else embedding
        # changes of an adaptive checkpoint besides its sizes
        structure: Mapping[str, Any] = getattr(config, "pruned_structure", None) or {}
        self._sliced = sorted(structure.get("sliced_arguments", {}))
        attributes = structure.get("attributes", {}).items()
        self._attributes = [(path, *pair) for path, values in attributes for pair in values.items()]
        stored = self._stored_sizes()
        places = {f"{_BLOCK.format(layer)}{module}.bias" for layer in range(len(stored)) for module in ALL_BIASES}
        usual = tuple(f"{module}.bias" for module in family.biases)
        self._added_biases = [name for name in shapes if name in places and not name.endswith(usual)]
        self._differ = bool(of_depth) or len(set(stored)) > 1 or 0 in (stored[0].heads, stored[0].ffn)
        self._differ |= bool(self._added_biases) and family.per_layer is not None and bool(family.per_layer.biases)
        self._per_layer = family.per_layer if self._differ else None
        self.architecture = family.name if self._per_layer is None else self._per_layer.name
        self._blocks = [self._with_stand_ins(layer, sizes) for layer, sizes in enumerate(stored)]
        self._check()
        rope, factors = self._rope()
        self.tensors = self._all_tensors(factors)
        self._check_blocks(quantization)
        self.fields = self._all_fields(quantization, rope)
        self.least_agreement = LEAST_OF_PACKED if packed else LEAST_AGREEMENT.get(quantization, 0.0)

    @property
    def needed_bytes(self) -> int:
        """Bytes on disk at most: llama.cpp's quantiser makes its file, no larger, from that of the plan."""
        return self._copies * sum(tensor.nbytes for tensor in self.tensors)

    def _stored_sizes(self) -> list[LayerSizes]:
        """The sizes of each layer.

        A layer with experts has the channels of a plain FFN, as in other layers or the configuration. A latent
        attention has as many heads as its output module reads.
        """
        stored, config = layer_sizes(self._config, self._shapes), self._config
        if self._family.experts is not None:
            plain = next((sizes.ffn for sizes in stored if sizes.ffn), getattr(config, "intermediate_size", None) or 0)
            stored = [sizes._replace(ffn=sizes.ffn or plain) for sizes in stored]
        if self._family.latent:
            outputs = (self._shapes.get(f"{_BLOCK.format(layer)}{_O}.weight", (0, 0)) for layer in range(len(stored)))
            heads = [shape[1] // config.v_head_dim for shape in outputs]
            stored = [sizes._replace(heads=n, kv_heads=n) for sizes, n in zip(stored, heads, strict=True)]
        return stored

    def _with_stand_ins(self, layer: int, sizes: LayerSizes) -> LayerSizes:
        """The layer sizes to write.

        llama.cpp takes the head size from the first layer, so that layer must have attention. It also ignores the
        attention of a layer without FFN. Placeholders have zero output weights; a remaining bias of such a module is
        kept. A placeholder FFN has as few channels as the quantisation's blocks allow.
        """
        ffn, heads, kv_heads = sizes
        needed = layer == 0 or self._per_layer is None or not self._per_layer.skips_attention
        if not heads and (needed or f"{_BLOCK.format(layer)}{_O}.bias" in self._shapes):
            heads = kv_heads = 1
        return LayerSizes(ffn or int(gguf.GGML_QUANT_SIZES[self._matrices][0]), heads, kv_heads)

    def _check(self) -> None:
        """Reject tensors and settings that the architecture cannot express."""
        usual = max(self._blocks, key=self._blocks.count)
        layers = {str(layer): sizes for layer, sizes in enumerate(self._blocks)}
        uneven = [name for name, b in layers.items() if b.heads and (not b.kv_heads or b.heads % b.kv_heads)]
        known = (*EPSILON_NAMES, *_DERIVED)
        changed = [*self._sliced, *(f"{path}.{name}" for path, name, _ in self._attributes if name not in known)]
        differing = [name for name, sizes in layers.items() if sizes != usual]
        output = self._per_layer is not None and self._per_layer.tied and "lm_head.weight" in self._written
        if self._differ and (self._per_layer is None or output):
            kind = f"{self._family.name}{' with an output of its own' * output}"
            problem = f"llama.cpp has no {kind} whose layers differ (layers {{}})"
            _refuse(differing, problem, "Prune with --layout uniform")
        if self._per_layer is None or not self._per_layer.biases:
            _refuse(
                self._added_biases,
                f"llama.cpp's {self.architecture} has no place for the biases {{}}",
                "Prune with --restore, which compensates for removed units without adding biases",
            )
        _refuse(uneven, "Query heads are no multiple of KV heads in the layers {}", "Prune whole KV groups")
        _refuse(changed, "llama.cpp has no field for {}", "Prune with --layout uniform")

    def _rope(self) -> tuple[WriterFields, tuple[float, ...] | None]:
        """Fields and factors of the rotary embedding. Raises ExportError if the architecture has no place for them."""
        fields, factors = rope_fields(self._config, self._family, self._head_size)
        if self._per_layer is None:
            return fields, factors
        problem = None if factors is None or self._per_layer.rope_factors else "factors of rotary frequencies"
        try:
            if self._per_layer.windows:
                fields, factors = rope_of_windows(self._config, self._family, self._head_size)
        except ValueError as error:
            problem = str(error)
        if problem is not None:
            raise ExportError(f"llama.cpp's {self.architecture} has no {problem}", "Prune with --layout uniform")
        return fields, factors

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
        fields += [*head_fields(config, self._family, self._head_size), ("layer_norm_rms_eps", self._epsilon()), *rope]
        fields += [(name, float(getattr(config, own))) for name, own in self._family.scales.items()]
        fields += self._experts
        if self._per_layer is not None:
            fields += self._per_layer.fields.items()
        elif self._family.window_period and window is not None:
            fields.append(("sliding_window", window))
        if self._family.soft_capped:
            fields.append(("attn_logit_softcapping", float(config.attn_logit_softcapping)))
            fields.append(("final_logit_softcapping", float(config.final_logit_softcapping)))
        return fields

    @property
    def _written(self) -> dict[str, Shape]:
        """The stored tensors that the file has.

        Left out are a tied output, the norm before an attention that llama.cpp skips, and the rotary frequencies that
        old checkpoints store: llama.cpp computes them and rejects a file that has them.
        """
        skipped = {
            f"{_BLOCK.format(layer)}input_layernorm.weight" for layer, b in enumerate(self._blocks) if not b.heads
        }
        if getattr(self._config, "tie_word_embeddings", False):
            skipped.add("lm_head.weight")
        skipped.update(name for name in self._shapes if name.endswith(_FREQUENCIES))
        return {name: shape for name, shape in self._shapes.items() if name not in skipped}

    def _all_tensors(self, factors: tuple[float, ...] | None) -> list[PlannedTensor]:
        """All tensors in order. factors: of the frequencies of the rotary embedding."""
        fused = self._per_layer and self._per_layer.fused_inputs
        names = Names(self.architecture if fused else self._family.name, len(self._blocks))
        parts, unknown = grouped(self._written, names, self._family, fused_inputs=bool(fused))
        _refuse(unknown, f"llama.cpp's {self.architecture} has no place for {{}}", "Use the folder with transformers")
        uneven = [name for name, groups in parts.items() if len({group.shape[1:] for group in groups}) > 1]
        _refuse(uneven, "llama.cpp needs experts of one size in a layer, and {} differ", "Prune whole experts")
        groups = {name: joined(found) for name, found in parts.items()}
        self._experts = self._expert_fields(groups)
        constants = {} if factors is None else {"rope_freqs.weight": factors}
        if self._per_layer is not None:
            sizes = self._shapes["model.embed_tokens.weight"][1], self._head_size
            constants |= neutral_norms(self._per_layer, len(self._blocks), groups, self._epsilon(), sizes)
        found = [replace(self._tensor(name, Group((), (len(one),))), values=one) for name, one in constants.items()]
        stand_ins = {} if self._per_layer is None else self._stand_ins(names, bool(fused))
        found += [self._tensor(name, group) for name, group in groups.items()]
        return found + [self._tensor(name, Group((), one)) for name, one in stand_ins.items() if name not in groups]

    def _stand_ins(self, names: Names, fused: bool) -> dict[str, Shape]:
        """Shapes of the matrices and norms of every block, which are zeros if they are not stored."""
        hidden, head = self._shapes["model.embed_tokens.weight"][1], self._head_size
        found: dict[str, Shape] = {}
        for layer, sizes in enumerate(self._blocks):
            queries, keys = sizes.heads * head, sizes.kv_heads * head
            shapes: dict[str, Shape] = {
                _GATE: (sizes.ffn, hidden),
                _UP: (sizes.ffn, hidden),
                _DOWN: (hidden, sizes.ffn),
            }
            if fused:
                shapes |= {_QKV: (queries + 2 * keys, hidden), _QNORM: (head,), _KNORM: (head,)}
            elif sizes.heads:
                shapes |= {_Q: (queries, hidden), _K: (keys, hidden), _V: (keys, hidden)}
            if sizes.heads:
                shapes[_O] = (hidden, queries)
            found |= {
                str(names.of(f"{_BLOCK.format(layer)}{module}.weight")): shape for module, shape in shapes.items()
            }
        return found

    def _expert_fields(self, groups: Mapping[str, Group]) -> WriterFields:
        """Fields of a mixture of experts. Raises ExportError if layers have other numbers or sizes of experts."""
        if self._family.experts is None:
            return []
        sizes: dict[str, dict[str, int]] = {}
        for layer in range(len(self._blocks)):
            mixed = groups.get(f"blk.{layer}.ffn_gate_exps.weight")
            if mixed is not None:
                shared = groups.get(f"blk.{layer}.ffn_gate_shexp.weight")
                sizes[str(layer)] = {
                    "experts": mixed.shape[0], "channels": mixed.shape[1],
                    "shared": 0 if shared is None else shared.shape[0],
                }  # fmt: skip
        usual = max(sizes.values(), key=[*sizes.values()].count)
        _refuse(
            [layer for layer, one in sizes.items() if one != usual],
            f"llama.cpp's {self.architecture} needs the same experts in all layers, and layer {{}} differs",
            "Prune with --layout uniform",
        )
        return expert_fields(self._config, self._family.experts, min(map(int, sizes)), usual)

    def _tensor(self, name: str, group: Group) -> PlannedTensor:
        module = name.split(".")[-2]
        rotated = module in ("attn_q", "attn_k") and bool(group.sources)
        kind = self._vocabulary if module in ("token_embd", "output") else self._matrices
        if len(group.shape) == 1 or name.endswith(".bias") or module.startswith("ffn_gate_inp"):
            kind = Kind.F32
        # llama.cpp's converter writes the gate of the shared expert as a vector
        shape = group.shape[1:] if module == "ffn_gate_inp_shexp" else group.shape
        factor = 1.0
        if self._per_layer is not None and self._per_layer.unscaled and module == "attn_q_norm":
            factor = (getattr(self._config, "query_pre_attn_scalar", None) or self._head_size) ** -0.5
        adjacent = self._family.interleaved if self._per_layer is None else self._per_layer.interleaved
        return PlannedTensor(
            name=name, sources=group.sources, shape=shape, kind=kind, part=group.part,
            head_rows=self._head_size if rotated and adjacent else 0,
            offset=self._family.norm_offset if name.endswith("norm.weight") else 0.0,
            factor=factor, packed=bool(group.sources) and all(source in self._packed for source in group.sources),
        )  # fmt: skip

    def _check_blocks(self, quantization: str) -> None:
        sizes = [(one, int(gguf.GGML_QUANT_SIZES[one.kind][0])) for one in self.tensors]
        wrong = [f"{one.title} ({one.shape[-1]})" for one, size in sizes if one.shape[-1] % size]
        block = max(size for _, size in sizes)
        _refuse(
            wrong,
            f"{len(wrong)} tensors have an input size that the blocks of {quantization} ({block}) do not divide: {{}}",
            f"Prune with --align {block}, or use --quantization f16",
        )


def _refuse(offenders: Sequence[str], problem: str, remedy: str) -> None:
    """Raise ExportError if there are offenders, which replace `{}` in the problem."""
    if offenders:
        raise ExportError(problem.format(listed(offenders, 8)), remedy)
