"""Export of a model in the format of another program, and upload of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from saap.core.errors import ExportError, ModelError, OutputError, first_line
from saap.export.model_card import load_lines, mlx_line, opens_only_in_mlx
from saap.export.placing import check_file, check_output, check_source_stays
from saap.export.source import Exported, open_source
from saap.models.checkpoint.safetensor_files import stored_dtype, weight_files
from saap.models.loading.llama_cpp import llama_cpp_is_installed
from saap.models.loading.references import read_config, resolve_model
from saap.pipeline.shared.progress import Reporter, Silent
from saap.settings.export import ExportRequest, GgufType
from saap.settings.registry import ExportFormat

if TYPE_CHECKING:
    from saap.export.gguf.result import GgufExport

_NOT_UPLOADED = [".*", "*/.*", "*.part", "*__pycache__*"]


def check_packages(request: ExportRequest) -> None:
    """Raise ConfigurationError or ExportError if a package that the export needs is not installed."""
    request.format.check()
    by_llama_cpp = request.quantization.made_by_llama_cpp
    opened = request.format is ExportFormat.GGUF and (request.verify or by_llama_cpp)
    if opened and not llama_cpp_is_installed():
        needs, flags = "Checking the file", "--no-verify"
        if by_llama_cpp:
            needs, flags = f"The type {request.quantization}", "--quantization q8_0 --no-verify"
        raise ExportError(
            f"{needs} needs the package llama-cpp-py-sync", f"Run pip install 'saap[gguf]', or use {flags}"
        )


def export_model(
    source: str | Path,
    out: str | Path,
    request: ExportRequest,
    *,
    overwrite: bool = False,
    revision: str | None = None,
    reporter: Reporter | None = None,
) -> Exported:
    """Write a model atomically in a format of the registry.

    source: anything that `saap prune` accepts, or its result. Raises ExportError with the layers that the format does
    not support or for missing llama.cpp, ConfigurationError for another missing package, OutputError, ModelError.
    """
    progress, target = reporter or Silent(), Path(out)
    check_packages(request)
    write: Any = request.format.load()
    check_source_stays(source, target)
    check = check_file if request.format.suffix else check_output
    check(target, 0, overwrite=overwrite)
    progress.stage("read the model")
    return cast(
        "Exported", write(open_source(source, revision), target, request, overwrite=overwrite, progress=progress)
    )


def export_gguf(
    source: str | Path,
    out: str | Path,
    *,
    quantization: GgufType | str = GgufType.F16,
    imatrix: bool = True,
    overwrite: bool = False,
    verify: bool = True,
    revision: str | None = None,
    reporter: Reporter | None = None,
) -> GgufExport:
    """Write a model as GGUF, with an Ollama Modelfile next to it; `out` exists only after it has passed the check.

    source: anything that `saap prune` accepts, or its result in either layout. imatrix: types that llama.cpp's own
    quantiser makes weigh errors by activations on bundled text. verify: open the file in llama.cpp and compare its
    logits on a text with those of transformers. With q4_1, the integers of a folder written by `saap recover` (4 bits,
    groups of 32) are copied exactly. Raises as `export_model` does.
    """
    given: dict[str, Any] = {"quantization": quantization, "verify": verify}  # a type may be text, which is checked
    request = ExportRequest(format=ExportFormat.GGUF, **given).model_copy(update={"imatrix": imatrix})
    done = export_model(source, out, request, overwrite=overwrite, revision=revision, reporter=reporter)
    return cast("GgufExport", done)


def export_mlx(
    source: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    revision: str | None = None,
    reporter: Reporter | None = None,
) -> Path:
    """Write a checkpoint as a folder for MLX-LM. Returns its path.

    source: a folder of safetensors in either layout. The integers and scales of a folder written by `saap recover`
    (groups of 32, 64 or 128) are copied exactly. verify: where mlx-lm is installed, check first that it has a place for
    every tensor. Raises as `export_model` does.
    """
    request = ExportRequest(format=ExportFormat.MLX, verify=verify)
    return export_model(source, out, request, overwrite=overwrite, revision=revision, reporter=reporter).path


def push(folder: str | Path, repository: str, *, private: bool = False, reporter: Reporter | None = None) -> str:
    """Upload a checkpoint folder to a model repository of the hub, created if necessary. Returns its URL.

    The folder is uploaded unchanged after the usual checks of a model. Raises ModelError; OutputError if not logged in,
    for an invalid name or an existing public repository if it is to be private, or if the hub rejects the upload or
    cannot be reached.
    """
    # nothing is fetched to be uploaded again, and no code is run
    resolved = resolve_model(folder, trust_remote_code=True, weights=False) if Path(folder).is_dir() else None
    if resolved is None or resolved.gguf_file is not None:
        raise ModelError(f"{folder} is not the folder of a checkpoint", "Give the folder that `saap prune` wrote")
    stored_dtype(weight_files(resolved.folder))  # raises for damaged files; those for MLX alone are uploaded too
    files = [file for file in resolved.folder.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    (reporter or Silent()).stage(f"upload {len(files)} files, {size / 1e6:,.1f} MB, to {repository}")
    api = HfApi()
    try:
        created = api.create_repo(repository, repo_type="model", private=private, exist_ok=True)
        public = private and not api.repo_info(created.repo_id).private  # the hub leaves existing ones as they are
        if not public:
            api.upload_folder(
                repo_id=created.repo_id, folder_path=resolved.folder, ignore_patterns=_NOT_UPLOADED,
                commit_message="Upload pruned model",
            )  # fmt: skip
    except HFValidationError as error:
        problem = f"{repository!r} is not a repository name ({first_line(error)})"
        raise OutputError(problem, "Write OWNER/NAME") from None
    except Exception as error:  # no token, no connection: each version of the hub's client raises its own errors
        rejected = f"The hub rejects the upload to {repository}"
        problem = rejected if isinstance(error, HfHubHTTPError) else f"The upload to {repository} failed"
        remedy = "Log in with `hf auth login` as a user with write access, and try again"
        raise OutputError(f"{problem} ({first_line(error)})", remedy) from error
    if public:
        raise OutputError(f"{created.repo_id} exists and is public", "Choose another name, or leave out --private")
    return str(created)


def opening_lines(folder: str | Path, repository: str) -> tuple[str, ...]:
    """The lines that open a checkpoint folder from a repository of the hub."""
    config = read_config(Path(folder))
    if opens_only_in_mlx(config):
        return (mlx_line(repository, needs_loader="model_file" in config),)
    return load_lines(repository, config, Path(folder))
