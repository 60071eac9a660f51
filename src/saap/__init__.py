"""saap: structured pruning of language models with structural importance awareness.

    import saap
    result = saap.prune("smollm2", pruning_ratio=0.2, out="small")
    model = saap.load("small")

Names are imported when they are first used, so that `import saap` is quick and loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from saap._version import __version__

if TYPE_CHECKING:
    from saap.api import discover, estimate, evaluate, prune, recover, search
    from saap.core.errors import SaapError
    from saap.core.records import CoupledGroup, ImportanceScores, Layout, ModelGraph, Role, StructurePlan
    from saap.models.checkpoint.pruned_structure import removed_modules
    from saap.models.loading.pretrained import load
    from saap.pipeline.evaluate.run import EvalReport
    from saap.pipeline.export.run import GgufExport, export_decilm, export_gguf, push
    from saap.pipeline.prune.result import PruneReport, PruneResult
    from saap.pipeline.recover.result import RecoverReport, RecoverResult

_HOMES = {
    "discover": "saap.api",
    "estimate": "saap.api",
    "search": "saap.api",
    "prune": "saap.api",
    "recover": "saap.api",
    "evaluate": "saap.api",
    "export_gguf": "saap.pipeline.export.run",
    "export_decilm": "saap.pipeline.export.run",
    "push": "saap.pipeline.export.run",
    "GgufExport": "saap.pipeline.export.run",
    "EvalReport": "saap.pipeline.evaluate.run",
    "load": "saap.models.loading.pretrained",
    "removed_modules": "saap.models.checkpoint.pruned_structure",
    "PruneReport": "saap.pipeline.prune.result",
    "PruneResult": "saap.pipeline.prune.result",
    "RecoverReport": "saap.pipeline.recover.result",
    "RecoverResult": "saap.pipeline.recover.result",
    "SaapError": "saap.core.errors",
    "CoupledGroup": "saap.core.records",
    "ImportanceScores": "saap.core.records",
    "Layout": "saap.core.records",
    "ModelGraph": "saap.core.records",
    "Role": "saap.core.records",
    "StructurePlan": "saap.core.records",
}

__all__ = [
    "discover",
    "estimate",
    "search",
    "prune",
    "recover",
    "evaluate",
    "load",
    "removed_modules",
    "export_gguf",
    "export_decilm",
    "push",
    "PruneResult",
    "PruneReport",
    "RecoverResult",
    "RecoverReport",
    "EvalReport",
    "GgufExport",
    "ModelGraph",
    "CoupledGroup",
    "ImportanceScores",
    "StructurePlan",
    "Role",
    "Layout",
    "SaapError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'saap' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
