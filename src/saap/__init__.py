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
    from saap.errors import SaapError
    from saap.models.loading import load
    from saap.models.structure import removed_modules
    from saap.pipeline.evaluate import EvalReport
    from saap.pipeline.export import GgufExport, export_decilm, export_gguf, push
    from saap.pipeline.recovery_report import RecoverReport, RecoverResult
    from saap.pipeline.report import PruneReport, PruneResult
    from saap.records import CoupledGroup, ImportanceScores, Layout, ModelGraph, Role, StructurePlan

_HOMES = {
    "discover": "saap.api",
    "estimate": "saap.api",
    "search": "saap.api",
    "prune": "saap.api",
    "recover": "saap.api",
    "evaluate": "saap.api",
    "export_gguf": "saap.pipeline.export",
    "export_decilm": "saap.pipeline.export",
    "push": "saap.pipeline.export",
    "GgufExport": "saap.pipeline.export",
    "EvalReport": "saap.pipeline.evaluate",
    "load": "saap.models.loading",
    "removed_modules": "saap.models.structure",
    "PruneReport": "saap.pipeline.report",
    "PruneResult": "saap.pipeline.report",
    "RecoverReport": "saap.pipeline.recovery_report",
    "RecoverResult": "saap.pipeline.recovery_report",
    "SaapError": "saap.errors",
    "CoupledGroup": "saap.records",
    "ImportanceScores": "saap.records",
    "Layout": "saap.records",
    "ModelGraph": "saap.records",
    "Role": "saap.records",
    "StructurePlan": "saap.records",
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
