"""saap: structured pruning of language models with structural importance awareness.

    import saap
    result = saap.prune("smollm2", pruning_ratio=0.2, output_dir="small")
    model = saap.load("small")

Names are imported lazily on first use, so `import saap` is fast and does not import torch. Editors read the signatures
from `__init__.pyi`, which `scripts/api_stub.py` generates from the settings.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from saap._version import __version__

_HOMES = {
    "discover": "saap.api",
    "estimate": "saap.api",
    "search": "saap.api",
    "prune": "saap.api",
    "recover": "saap.api",
    "evaluate": "saap.api",
    "load": "saap.models.loading.pretrained",
    "removed_modules": "saap.models.checkpoint.pruned_structure",
    "export_gguf": "saap.pipeline.export.run",
    "export_mlx": "saap.pipeline.export.run",
    "push": "saap.pipeline.export.run",
    "PruneResult": "saap.pipeline.prune.result",
    "PruneReport": "saap.pipeline.prune.result",
    "RecoverResult": "saap.pipeline.recover.result",
    "RecoverReport": "saap.pipeline.recover.result",
    "EvalReport": "saap.core.evaluation_records",
    "GgufExport": "saap.export.gguf.result",
    "ModelGraph": "saap.core.records",
    "CoupledGroup": "saap.core.records",
    "ImportanceScores": "saap.core.records",
    "StructurePlan": "saap.core.records",
    "Role": "saap.core.roles",
    "Layout": "saap.core.roles",
    "SaapError": "saap.core.errors",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'saap' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
