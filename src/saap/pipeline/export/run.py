"""Writing a model, pruned or not, in the format of another program, and checking the file in that program."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from saap.core.errors import ExportError, ModelError
from saap.core.files import whole_file
from saap.core.storage import write_whole
from saap.data.samples import token_stream
from saap.data.texts import evaluation_text
from saap.evaluation.agreement import Agreement, compare_with_llama_cpp
from saap.export.push import push_folder
from saap.models.checkpoint.groupwise import PackedMatrices
from saap.models.checkpoint.modeling_pruned import MODEL_TYPE
from saap.models.checkpoint.pruned_structure import auto_class
from saap.models.checkpoint.safetensor_files import StoredTensors, weight_files
from saap.models.loading.llama_cpp import LlamaCpp, llama_cpp_is_installed
from saap.models.loading.pretrained import load_model, load_tokenizer, quiet_transformers, register_pruned_models
from saap.models.loading.references import PACKAGED_MODELS, ResolvedModel, packaged_file, read_config, resolve_model
from saap.pipeline.prune.result import load_lines
from saap.pipeline.shared.dense_model import manifest_of
from saap.pipeline.shared.progress import Reporter, Silent
from saap.settings.prune import GgufType

if TYPE_CHECKING:
    from saap.export.gguf.fields import Field
    from saap.export.gguf.plan import GgufPlan

CHECKED_TOKENS = 512
WINDOW = 256
INSTALL = "Run pip install 'saap[gguf]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufExport:
    """A written GGUF file.

    architecture: llama.cpp's. tokenizer: where its tokenizer came from. agreement: with the transformers model in
    float32, None if it was not checked. same_tokens: whether both tokenizers cut the checked text alike.
    packed_matrices: how many were copied from the integers of `saap recover`; not_packed: why none was, where there are
    such integers.
    """

    path: Path
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
        agreement = self.agreement
        return {
            "path": str(self.path),
            "modelfile": str(self.modelfile),
            "bytes": self.bytes,
            "architecture": self.architecture,
            "quantization": self.quantization,
            "tokenizer": self.tokenizer,
            "checked_tokens": None if agreement is None else agreement.tokens,
            "equal_predictions": None if agreement is None else agreement.share,
            "divergence": None if agreement is None else agreement.divergence,
            "same_tokens": self.same_tokens,
            "packed_matrices": self.packed_matrices,
            "not_packed": self.not_packed,
        }


@dataclass(frozen=True, slots=True)
class ExportSource:
    """The model to export. model: loaded, where it is no folder of safetensors."""

    resolved: ResolvedModel
    config: Any
    tensors: StoredTensors
    tokenizer: Any | None
    model: Any | None


def export_gguf(
    source: str | Path,
    out: str | Path,
    *,
    quantization: GgufType | str = GgufType.F16,
    overwrite: bool = False,
    verify: bool = True,
    revision: str | None = None,
    reporter: Reporter | None = None,
) -> GgufExport:
    """Write a model as GGUF, with an Ollama Modelfile beside it; `out` appears only when it has passed the check.

    source: what `saap prune` takes, or what it wrote, in either layout. verify: open the file in llama.cpp and compare
    its logits on a text with those of transformers. Raises ExportError, naming the layers, if llama.cpp cannot compute
    the same, OutputError, ModelError.
    With q4_1, a folder that `saap recover` has written (4 bits, groups of 32) gives its very integers.
    """
    target = Path(out)
    if importlib.util.find_spec("gguf") is None:
        raise ExportError("Writing GGUF needs the package gguf", INSTALL)
    if verify and not llama_cpp_is_installed():
        raise ExportError("Checking the file needs the package llama-cpp-py-sync", f"{INSTALL}, or use --no-verify")
    from saap.export.gguf.modelfile import modelfile
    from saap.export.gguf.plan import plan_gguf
    from saap.export.gguf.write import check_file, write_gguf

    kind = GgufType(quantization)
    progress = reporter if reporter is not None else Silent()
    check_file(target, 0, overwrite=overwrite)
    progress.stage("read the model")
    opened = open_source(source, revision)
    packed = PackedMatrices(opened.resolved.folder) if kind is GgufType.Q4_1 else None
    plan = plan_gguf(opened.config, opened.tensors.shapes, kind, packed.names if packed is not None else ())
    fields, origin = _tokenizer(opened, plan)
    context: int = dict(plan.fields)["context_length"]
    check_file(target, plan.weight_bytes, overwrite=overwrite)
    with whole_file(target, remedy="Choose another --out") as part:
        progress.stage(f"write {target.name}")
        write_gguf(part, plan, opened.tensors, fields, _description(opened), packed, progress.advance)
        agreement, same = None, None
        if verify:
            progress.stage("compare it in llama.cpp with transformers")
            agreement, same = _compare(opened, part, context)
            _judge(agreement, plan, target)
    beside = target.with_name(f"{target.stem}.Modelfile")
    write_whole(beside, modelfile(target, opened.tokenizer, context=context).encode())
    return GgufExport(
        path=target, modelfile=beside, bytes=target.stat().st_size, architecture=plan.architecture,
        quantization=kind.value, tokenizer=origin, agreement=agreement, same_tokens=same,
        packed_matrices=sum(tensor.packed for tensor in plan.tensors),
        not_packed=None if packed is None else packed.refused,
    )  # fmt: skip


def export_decilm(source: str | Path, out: str | Path, *, overwrite: bool = False, revision: str | None = None) -> Path:
    """Write a checkpoint as a folder for vLLM's DeciLMForCausalLM. Returns its path.

    source: a folder of safetensors that `saap prune` wrote, or a stock LLaMA. Every layer must have all its query heads
    or no attention. Raises ExportError, naming the layers, OutputError, ModelError.
    """
    from saap.export.decilm import block_configs, write_decilm

    resolved = resolve_model(source, revision=revision)
    if resolved.gguf_file is not None:
        raise ExportError(
            f"{source} is a GGUF file, which holds no safetensors", "Prune it first, and export the folder"
        )
    files = weight_files(resolved.folder)
    config = _config(resolved)
    blocks = block_configs(config, StoredTensors.in_files(files).shapes)
    write_decilm(resolved.folder, files, config, blocks, Path(out), overwrite=overwrite)
    return Path(out)


def push(folder: str | Path, repository: str, *, private: bool = False, reporter: Reporter | None = None) -> str:
    """Upload a checkpoint folder to the hub as it is, after the checks that every model is opened with.

    Returns the repository's address. Raises ModelError, OutputError.
    """
    resolved = resolve_model(folder)
    if not Path(folder).is_dir() or resolved.gguf_file is not None:
        raise ModelError(f"{folder} is no folder of a checkpoint", "Give the folder that `saap prune` wrote")
    files = [file for file in resolved.folder.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    (reporter or Silent()).stage(f"upload {len(files)} files, {size / 1e6:,.1f} MB, to {repository}")
    return push_folder(resolved.folder, repository, private=private)


def opening_lines(folder: str | Path, repository: str) -> tuple[str, ...]:
    """The lines that open a checkpoint folder once it lies in a repository of the hub."""
    config = read_config(Path(folder))
    pruned = config["model_type"] == MODEL_TYPE
    name = auto_class(config["base_model_type"] if pruned else config["model_type"]).__name__
    return load_lines(Path(repository), "adaptive" if pruned else "uniform", name)


def open_source(source: str | Path, revision: str | None) -> ExportSource:
    """The model's configuration, weights and tokenizer; only a GGUF file is read whole. Raises ModelError."""
    resolved = resolve_model(source, revision=revision)
    tokenizer = load_tokenizer(resolved)
    if resolved.gguf_file is not None:
        model = load_model(resolved, device=torch.device("cpu"), dtype=torch.float32)
        return ExportSource(resolved, model.config, StoredTensors.of_model(model), tokenizer, model)
    tensors = StoredTensors.in_files(weight_files(resolved.folder))
    return ExportSource(resolved, _config(resolved), tensors, tokenizer, None)


def _config(resolved: ResolvedModel) -> Any:
    register_pruned_models()
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(resolved.folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{resolved.folder} has no usable config.json ({error})", "Check the file") from error


def _tokenizer(opened: ExportSource, plan: GgufPlan) -> tuple[Sequence[Field], str]:
    """The tokenizer's fields, from the GGUF file that the model came from if it is here and has the same tokens."""
    from saap.export.gguf.tokenizer import fields_from_gguf, fields_from_huggingface

    vocabulary = dict(plan.fields)["vocab_size"]
    file = _source_gguf(opened.resolved)
    if file is not None and opened.tokenizer is not None:
        fields = fields_from_gguf(file, opened.tokenizer.get_vocab(), vocabulary)
        if fields is not None:
            return fields, file.name
    fields = fields_from_huggingface(opened.tokenizer, vocabulary)
    if not all(field.value for field in fields if isinstance(field.value, list)):
        raise ExportError(
            "The tokenizer has no merges, without which llama.cpp cannot cut text", "Check its tokenizer.json"
        )
    return fields, "the model's folder"


def _source_gguf(resolved: ResolvedModel) -> Path | None:
    """The GGUF file that is the source, or that the source was pruned from."""
    if resolved.gguf_file is not None:
        return resolved.folder / resolved.gguf_file
    manifest = manifest_of(resolved)
    base = "" if manifest is None else manifest.base.source
    if base in PACKAGED_MODELS:
        try:
            return packaged_file(base)
        except ModelError:
            return None
    return Path(base) if base.endswith(".gguf") and Path(base).is_file() else None


def _description(opened: ExportSource) -> list[tuple[str, Any]]:
    """Name and licence, as far as they are known."""
    manifest = manifest_of(opened.resolved)
    if manifest is None:
        return [("type", "model"), ("name", Path(opened.resolved.source).name)]
    licence = [] if manifest.base.licence is None else [("license", manifest.base.licence)]
    return [("type", "model"), ("name", f"{Path(manifest.base.source).name}, pruned"), *licence]


def _compare(opened: ExportSource, file: Path, context: int) -> tuple[Agreement, bool]:
    model = opened.model
    if model is None:
        model = load_model(opened.resolved, device=torch.device("cpu"), dtype=torch.float32)
    text = evaluation_text()
    window = min(WINDOW, context)
    with LlamaCpp(file, context=window, threads=torch.get_num_threads(), exact=True) as runtime:
        ids = token_stream([text], opened.tokenizer)[:CHECKED_TOKENS].tolist()
        checked = text[: 4 * CHECKED_TOKENS]
        same = runtime.tokenize(checked) == token_stream([checked], opened.tokenizer).tolist()
        return compare_with_llama_cpp(model, runtime, ids, window=window), same


def _judge(agreement: Agreement, plan: GgufPlan, out: Path) -> None:
    if not agreement.share >= plan.quantization.least_agreement:
        raise ExportError(
            f"In llama.cpp {out.name} predicts the same next token as transformers for only {agreement.share:.1%} of "
            f"{agreement.tokens} tokens, so it is not kept",
            "Report this model as a fault of saap",
        )
