"""Loading of models and tokenizers, and their digests."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from saap.core.errors import ConfigurationError, ModelError, first_line, listed, out_of_memory
from saap.core.records import ModelRef, digest_of
from saap.models.checkpoint.groupwise import GroupwiseWeight, pack_linear, read_packed
from saap.models.checkpoint.modeling_pruned import MODEL_TYPE, SaapPrunedConfig
from saap.models.checkpoint.pruned_structure import auto_class
from saap.models.checkpoint.published_names import with_model_names
from saap.models.checkpoint.safetensor_files import StoredTensors, weight_files
from saap.models.loading.devices import DeviceMap, check_known, pick_device, require_values, working_dtype
from saap.models.loading.references import ResolvedModel, read_config, resolve_model
from saap.models.structure.linear import contracted_axis
from saap.models.walk.offload import offload, offloaded

SAMPLED_VALUES = 4096
# Configuration fields that do not affect the computation.
_INCIDENTAL_FIELDS = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache")
TOKENIZER_FILES = ("tokenizer*.json", "tokenizer.model", "vocab.*", "spiece.model")
_NO_MODEL = "cannot be opened as a causal language model"
_CHECK = "Check that its files are complete and of such a model"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def register_pruned_models() -> None:
    """Let transformers' auto classes open pruned checkpoints without running the code in their folders."""
    AutoConfig.register(MODEL_TYPE, SaapPrunedConfig, exist_ok=True)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Context without progress bars and warnings of transformers."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _explained(fault: str, remedy: str) -> Iterator[None]:
    """Context that silences transformers, and converts its exceptions to ModelError."""
    register_pruned_models()
    try:
        with quiet_transformers():
            yield
    except Exception as error:  # each family and each tokenizer library raises its own errors
        if out_of_memory(error):
            raise
        raise ModelError(f"{fault} ({first_line(error)})", remedy) from error


def load_model(
    resolved: ResolvedModel,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    device_map: DeviceMap | None = None,
) -> Any:
    """Load a transformers model in evaluation mode, with parameters that do not require gradients.

    Quantised weights are dequantised. dtype: to compute in; None: float32 for sources of 16 bits or fewer (bfloat16
    stays on CUDA), else the stored one.
    device_map: accelerate's device map, in place of `device`.
    Raises ModelError if the weights do not fit the configuration; nothing is initialised at random.
    """
    options: dict[str, Any] = {"dtype": dtype or working_dtype(device, resolved.dtype)}
    if device_map is not None:
        options["device_map"] = device_map if isinstance(device_map, str) else dict(device_map)
    if resolved.gguf_file is None:
        options["use_safetensors"] = True  # pickle files next to them are never read
    elif hasattr(transformers, "GgufConfig"):  # older versions always dequantise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    dequantised = resolved.gguf_file is not None or resolved.quantisation is not None
    if dequantised:
        options["config"] = load_config(resolved)
    # the progress bar of the GGUF reader cannot be disabled
    silence = nullcontext() if resolved.gguf_file is None else redirect_stderr(io.StringIO())
    with _explained(f"{resolved.source} {_NO_MODEL}", _CHECK), silence:
        model, info = _auto_class(resolved).from_pretrained(
            resolved.folder, output_loading_info=True, **resolved.options, **options
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{resolved.source} lacks the weights {listed(missing, 3)}", "Use a complete checkpoint")
    if dequantised:  # so the configuration must not say quantised
        for holder, name in ((model.config, "quantization_config"), (model, "hf_quantizer")):
            if hasattr(holder, name):
                delattr(holder, name)
        model.is_quantized = False
    _note_own_head(model)
    if device_map is None:
        model = model.to(device)
    else:
        require_values(model)
    return model.eval().requires_grad_(False)


def _note_own_head(model: Any) -> None:
    """Let the configuration say that the output head is not tied, where the files have another one than it says."""
    head = table = None
    with suppress(NotImplementedError):  # of a class where transformers does not find them
        head, table = (
            getattr(one, "weight", None) for one in (model.get_output_embeddings(), model.get_input_embeddings())
        )
    if head is not None and head is not table:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def model_without_weights(
    resolved: ResolvedModel, dtype: torch.dtype | None = None, *, with_buffers: bool = False
) -> Any:
    """A model with the right classes and shapes on the meta device, tied as its configuration says.

    with_buffers: whether computed buffers have values. Raises ModelError if it cannot be created.
    """
    empty = init_empty_weights(include_buffers=False) if with_buffers else torch.device("meta")
    config = load_config(resolved)
    with _explained(f"{resolved.source} {_NO_MODEL}", _CHECK), empty:
        trusted = resolved.trust_remote_code
        model = _auto_class(resolved).from_config(config, dtype=dtype or resolved.dtype, trust_remote_code=trusted)
    if with_buffers:  # each parameter has become one of its own
        model.tie_weights()
    return model.eval().requires_grad_(False)


def load_config(resolved: ResolvedModel) -> Any:
    """The transformers configuration of a model. Raises ModelError if it cannot be read."""
    with _explained(f"{resolved.source} {_NO_MODEL}", _CHECK):
        config = AutoConfig.from_pretrained(resolved.folder, **resolved.options)
    if resolved.gguf_file is not None:
        from saap.models.checkpoint.gguf_files import state_expert_sizes

        state_expert_sizes(config, resolved.path)
    if resolved.quantisation is not None:
        config.quantization_config = {**config.quantization_config, "dequantize": True}
    return config


def _auto_class(resolved: ResolvedModel) -> Any:
    """The auto class of the model: for text, or for images and text if the family has no text-only class."""
    if resolved.gguf_file is not None:
        return AutoModelForCausalLM
    config = read_config(resolved.folder)
    return auto_class(config.get("base_model_type", config["model_type"]))


def load_tokenizer(resolved: ResolvedModel) -> Any | None:
    """The tokenizer of the model, None if its folder has none. Raises ModelError if it cannot be read."""
    files = (file for pattern in TOKENIZER_FILES for file in resolved.folder.glob(pattern))
    if resolved.gguf_file is None and not any(files):
        return None
    with _explained(f"The tokenizer of {resolved.source} cannot be read", "Check its tokenizer files"):
        return AutoTokenizer.from_pretrained(resolved.folder, **resolved.options)


def end_tokens(model: Any, tokenizer: Any | None) -> set[int]:
    """The tokens that end what a model writes, by its generation configuration and its tokenizer."""
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = stated if isinstance(stated, list) else [stated]
    return {int(index) for index in (*listed, getattr(tokenizer, "eos_token_id", None)) if index is not None}


@contextmanager
def plain_generation(model: Any, ends: Collection[int]) -> Iterator[None]:
    """Context in which `generate` uses the model's own distribution, whatever its generation configuration says.

    ends: the tokens that end a text.
    """
    usual = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=sorted(ends) or None)
    try:
        yield
    finally:
        model.generation_config = usual


def load_processor(folder: Path, *, trust_remote_code: bool) -> Any | None:
    """The processor of the model in `folder`, None if it has none. Raises ModelError for bad files."""
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return None
    with _explained(f"The processor of {folder} cannot be opened", "Check its files"):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return processor if hasattr(processor, "image_processor") else None


def load(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    packed: bool = False,
    device_map: DeviceMap | None = None,
) -> Any:
    """Load a model written by saap, in either layout, or a stock model; no code of the folder is run.

    dtype: None keeps the stored one. packed: for a model written by `saap recover`; its linear layers then have
    integers, scales and zero points instead of full weights. device_map: as in transformers, in place of `device`; not
    supported for packed weights. Returns a transformers model in evaluation mode, whose parameters require gradients
    unless they are packed.
    Raises ModelError, ConfigurationError.
    """
    if device_map is not None:
        check_known(device_map)
        if packed:
            raise ConfigurationError("Packed weights cannot be on several devices", "Leave device_map or packed out")
    resolved = resolve_model(path)
    target = pick_device(device)
    stored = torch.float32 if resolved.gguf_file is not None else resolved.dtype
    if not packed:
        return trainable(load_model(resolved, device=target, dtype=dtype or stored, device_map=device_map))
    weights = read_packed(resolved.folder)
    return load_groupwise(
        resolved, lambda model: weights, lambda name, read: weights[name], device=target, dtype=dtype or stored
    )


def trainable(model: Any) -> Any:
    """The model, whose floating-point parameters now require gradients, as those of `from_pretrained` do."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return model


class NotByNameError(ModelError):
    """The names in the files are not those of the model, so it can only be loaded as a whole."""


def open_skeleton(resolved: ResolvedModel, dtype: torch.dtype) -> tuple[Any, StoredTensors]:
    """A model whose weights are on the meta device, its buffers read, and the tensors of its files.

    Raises NotByNameError if names in the files differ from the model's (a family that renames on loading).
    """
    reason = "it is a GGUF file" if resolved.gguf_file is not None else "it needs custom code"
    if resolved.quantisation is not None:
        reason = f"its weights are quantised with {resolved.quantisation}"
    elif resolved.gguf_file is None and not _runs_its_own_code(resolved):
        reason = "its files have other names for the weights than the model"
        model = model_without_weights(resolved, dtype, with_buffers=True)
        stored = with_model_names(model, StoredTensors.in_files(weight_files(resolved.folder)))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        buffers = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in parameters}
        held = dict(model.named_parameters()) | buffers
        if not _ties_hold(parameters, stored):
            fault = (
                f"{resolved.source} cannot be read part by part (its output head is its own, not tied to the embedding)"
            )
            raise NotByNameError(fault, "Set tie_word_embeddings to false in its config.json")
        if all(stored.shapes.get(name) == tuple(tensor.shape) for name, tensor in held.items()):
            values = {name: stored.read(name).clone() for name in buffers}
            model.load_state_dict(values, strict=False, assign=True)
            if (resolved.folder / "generation_config.json").is_file():
                with _explained(f"{resolved.source} {_NO_MODEL}", _CHECK):
                    model.generation_config = GenerationConfig.from_pretrained(resolved.folder)
            return model, stored
    raise NotByNameError(
        f"{resolved.source} cannot be read part by part ({reason})",
        "Leave out --max-memory, or save it with save_pretrained and give that folder",
    )


def _runs_its_own_code(resolved: ResolvedModel) -> bool:
    config = read_config(resolved.folder)
    return resolved.trust_remote_code and "auto_map" in config and config["model_type"] != MODEL_TYPE


def _ties_hold(parameters: Mapping[str, nn.Parameter], stored: StoredTensors) -> bool:
    """Whether the files have one value for each parameter of several names. parameters: by all names."""
    first = {id(one): name for name, one in reversed(list(parameters.items()))}
    pairs = [(name, first[id(one)]) for name, one in parameters.items()]
    return all(torch.equal(*map(stored.read, pair)) for pair in pairs if len({*pair} & stored.shapes.keys()) == 2)


@torch.no_grad()
def load_groupwise(
    resolved: ResolvedModel,
    paths_of: Callable[[Any], Collection[str]],
    weight_of: Callable[[str, Callable[[], Tensor]], GroupwiseWeight],
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Any:
    """Load a model with packed weights in some linear layers, tensor by tensor if its files allow that.

    paths_of: selects the layers of the model (possibly without weights). weight_of: returns the packed weight of the
    layer at a path; its second argument reads the stored one, (out, in). dtype: of everything else, and to compute in;
    None as in `load_model`. Raises ModelError.
    """
    chosen = dtype or working_dtype(device, resolved.dtype)
    try:
        model, stored = open_skeleton(resolved, chosen)
    except NotByNameError:
        model = load_model(resolved, device=torch.device("cpu"), dtype=chosen)
        stored = StoredTensors.of_model(model)

    def read(name: str) -> Tensor:
        tensor = stored.read(name)
        return tensor.to(device, chosen if tensor.is_floating_point() else tensor.dtype, copy=True)

    def read_linear(path: str) -> Tensor:
        weight = read(f"{path}.weight")
        return weight.T if contracted_axis(model.get_submodule(path)) == 0 else weight

    packed = {f"{path}.weight": path for path in paths_of(model)}
    others = {name: read(name) for name, _ in model.named_parameters() if name not in packed}
    model.load_state_dict(others, strict=False, assign=True)
    for path in packed.values():
        pack_linear(model, path, weight_of(path, partial(read_linear, path)), device)
    model.tie_weights()
    return model.to(device)


def load_offloaded(
    resolved: ResolvedModel,
    blocks_of: Callable[[nn.Module], Sequence[str]],
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Any:
    """As `load_model`, but weights stay in their files until they are used, see `saap.models.walk.offload`.

    blocks_of: paths of the decoder blocks of a model. Raises ModelError, also if the files do not allow it.
    """
    model, stored = open_skeleton(resolved, dtype or working_dtype(device, resolved.dtype))
    offload(model, blocks_of(model), stored, device=device)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model


@torch.no_grad()
def model_ref(model: nn.Module, source: str, revision: str | None = None) -> ModelRef:
    """Identity of a model. The weights digest covers name, shape, dtype and a strided sample of each parameter."""
    away = offloaded(model)
    config = getattr(model, "config", None)
    fields = config.to_dict() if config is not None and hasattr(config, "to_dict") else {"class": type(model).__name__}
    kept = {name: str(value) for name, value in fields.items() if name not in _INCIDENTAL_FIELDS}
    weights = hashlib.sha256()
    for name, parameter in model.named_parameters():
        weights.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        values = (parameter.detach() if away is None else away.value(parameter).to(parameter.dtype)).flatten()
        sample = values[:: max(1, -(-len(values) // SAMPLED_VALUES))].contiguous().cpu()
        weights.update(sample.view(torch.uint8).numpy().tobytes())
    return ModelRef(source=source, revision=revision, config_digest=digest_of(kept), weights_digest=weights.hexdigest())
