"""Public functions: the individual stages, and `prune`, which runs them in order.

Functions with settings accept every field of their settings models as a keyword; see `saap/__init__.pyi`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, TypeVar

from torch import nn

from saap.core.errors import ConfigurationError
from saap.core.evaluation_records import EvalReport
from saap.core.records import ImportanceScores, ModelGraph, StructurePlan
from saap.data.samples import Calibration, calibration_set
from saap.discovery import discover as _discover
from saap.estimation.estimate import estimate as _estimate
from saap.estimation.estimate import require_measured, unit_scores
from saap.models.loading.devices import computable, require_values
from saap.models.loading.pretrained import model_ref
from saap.models.walk.backend import Backend
from saap.models.walk.offload import offloaded
from saap.models.walk.spill import Spill
from saap.pipeline.evaluate.run import evaluate_model
from saap.pipeline.prune.result import PruneResult
from saap.pipeline.prune.run import run_prune
from saap.pipeline.recover.result import RecoverResult
from saap.pipeline.recover.run import run_recover
from saap.pipeline.shared.inputs import open_model
from saap.pipeline.shared.memory_limit import open_within
from saap.pipeline.shared.progress import Reporter
from saap.pipeline.shared.tokens import embedding_rows, sample_length
from saap.settings.evaluate import EvalRequest
from saap.settings.places import filled, models_of, places_of
from saap.settings.prune import PruneConfig, unit_roles
from saap.settings.recover import RecoverConfig
from saap.settings.run import OPENS, RunOptions
from saap.settings.setting import Only
from saap.structure_search.budget import budget_for_ratio
from saap.structure_search.plan import SearchSpace
from saap.structure_search.plan import search as _search

Result = TypeVar("Result")
_SCORED = Only(
    ("samples", "sample_length", "roles", "importance", "element_order", "aggregation", "seed", "bos"),
    {"pruning_ratios": 0, "restore": False},
)
_SEARCHED = Only(
    ("pruning_ratios", "strategy", "importance", "fusion_scope", "layout", "roles", "skip_layers", "align"),
    {"strategy": "uniform"},
)
_TUNED_IN = Only(("out", "overwrite", "work_dir", "keep_work", *OPENS))


def _with_settings(function: Callable[..., Result]) -> Callable[..., Result]:
    """Let a function take the fields of its settings models as keywords. Raises TypeError that lists unknown ones."""
    models, signature = models_of(function), inspect.signature(function)
    own = inspect.Signature([one for name, one in signature.parameters.items() if name not in models])
    places = [(name, place) for place in places_of(function) for name in place.setting.names]
    known = {name: [place] for name, place in places if name not in own.parameters}

    @wraps(function)
    def call(*positional: Any, **given: Any) -> Result:
        unknown = given.keys() - known.keys() - own.parameters.keys()
        if unknown:
            raise TypeError(f"{function.__name__}() takes no argument named {', '.join(sorted(unknown))}")
        settings = filled(function, known, {name: value for name, value in given.items() if name in known})
        bound = own.bind(*positional, **{name: value for name, value in given.items() if name not in known})
        return function(**bound.arguments, **settings)

    return call


def discover(model: str | Path | nn.Module, *, finer_heads: bool = False) -> ModelGraph:
    """Find the coupled structures of a model by tracing it; the model is not changed.

    model: a loaded model (custom classes included), or anything that `saap prune` accepts. finer_heads: also return the
    query heads inside each KV group as separate groups (role `query`).
    Raises UnsupportedModelError, naming the op or module that stopped the analysis, and ModelError.
    """
    if isinstance(model, nn.Module):
        return _discover(model, model_ref(model, type(model).__name__, None), finer_heads=finer_heads)
    loaded = open_model(model, RunOptions(device="cpu"))
    return _discover(loaded.model, loaded.ref, finer_heads=finer_heads)


@_with_settings
def estimate(
    model: str | Path | nn.Module,
    graph: ModelGraph,
    calibration: Calibration,
    config: Annotated[PruneConfig, _SCORED],
    options: Annotated[RunOptions, Only(("max_memory",))],
    *,
    tokenizer: Any | None = None,
) -> ImportanceScores:
    """Estimate the importance of every unit over the calibration samples (SAAP, estimation stage).

    model: a loaded model, or anything that `saap prune` accepts. calibration: names and files as on the command line,
    texts (both need a tokenizer), or token ids of shape (samples, length). max_memory: limit of the resident memory in
    bytes; to meet it, the weights of a model given by its folder may stay in their files.
    Raises CalibrationError, ModelError, NonFiniteLossError, ConfigurationError for a limit that is too small.
    """
    if isinstance(model, nn.Module):
        require_values(model)
        opened = computable(model)
    else:
        loaded = open_within(model, config, options, tokenizer)
        opened, tokenizer = loaded.model, loaded.tokenizer
    tokens = calibration_set(
        calibration,
        tokenizer,
        samples=config.samples,
        length=sample_length(opened, config),
        seed=config.seed,
        vocabulary=embedding_rows(opened),
        bos=config.bos,
    )
    with TemporaryDirectory(prefix="saap-") as folder:
        return _estimate(
            Backend(opened, graph, spill=Spill(Path(folder)) if offloaded(opened) is not None else None),
            tokens, roles=unit_roles(config.roles), importance=config.importance, element_order=config.element_order,
            aggregation=config.aggregation,
        )  # fmt: skip


@_with_settings
def search(graph: ModelGraph, scores: ImportanceScores, config: Annotated[PruneConfig, _SEARCHED]) -> StructurePlan:
    """A structure plan from scores alone, without measuring candidates (SAAP, adaptive structure search).

    pruning_ratio: fraction of the decoder blocks' parameters. skip_layers: how many blocks to protect (first, last).
    The strategy `adaptive` measures candidates and therefore needs `prune`. Raises TargetError, and ConfigurationError
    for scores of another importance, or without those of the requested roles.
    """
    space = SearchSpace(roles=config.roles, layout=config.layout, align=config.align, skip_layers=config.skip_layers)
    require_measured(scores, config.importance)
    units = unit_scores(scores, graph, config.importance, config.fusion_scope)
    if len(config.pruning_ratios) != 1:
        raise ConfigurationError("search() takes one pruning_ratio", "Call it for each")
    return _search(graph, units, budget_for_ratio(graph, config.pruning_ratios[0]), space, config.strategy)


@_with_settings
def recover(
    model: str | Path,
    config: RecoverConfig,
    options: Annotated[RunOptions, _TUNED_IN],
    *,
    reporter: Reporter | None = None,
) -> RecoverResult:
    """Tune a model on text with quantised weights; write it to `output_dir` if given (SAAP, recovery stage).

    model: a folder written by `prune`, or anything else that `saap recover` accepts. The other arguments are the flags
    of `saap recover`. Raises SaapError.
    """
    return run_recover(model, config, options, reporter)


@_with_settings
def prune(
    model_or_path: str | Path | nn.Module,
    config: PruneConfig,
    options: RunOptions,
    *,
    calibration: Calibration = "mixed",
    tokenizer: Any | None = None,
    reporter: Reporter | None = None,
) -> PruneResult:
    """Prune a model: discover, estimate, search, cut, reconstruct, check, and write it to `output_dir` if given.

    model_or_path: a loaded model, or anything that `saap prune` accepts. A loaded model may be of any class with
    forward(input_ids). It is not changed; a float16 model is pruned as a float32 copy. Give exactly one of
    pruning_ratio, target_params, target_size, target_speedup and plan. calibration: names and files, texts, or token
    ids (samples, length). max_memory: limit of the resident memory in bytes; to meet it, weights may stay in files, for
    a model given by its folder and for the result. device_map: auto, balanced or sequential, to place blocks on several
    devices; a loaded model keeps its own device map. The other arguments are the flags of `saap prune`. Raises
    SaapError.
    """
    if len(config.pruning_ratios) > 1:
        raise ConfigurationError("prune() takes one pruning_ratio", "Call it for each, or use `saap prune`")
    # name in the records; texts and token ids have none of their own
    named = (str(calibration),) if isinstance(calibration, (str, Path)) else ("given from Python",)
    config = config.model_copy(update={"calibration": named})
    (result,) = run_prune(model_or_path, config, options, reporter, calibration=calibration, tokenizer=tokenizer)
    return result


@_with_settings
def evaluate(
    model_or_path: str | Path | nn.Module,
    request: Annotated[EvalRequest, Only((), {"texts": ("bundled",)})],
    options: Annotated[RunOptions, Only(OPENS)],
    *,
    tokenizer: Any | None = None,
    reporter: Reporter | None = None,
) -> EvalReport:
    """Measure a model: perplexity on texts, accuracy on zero-shot tasks, generation, and speed.

    texts: names of data sets, files, or `bundled`, a text of several kinds that is never used for calibration. tasks:
    names in lm-evaluation-harness. speed: whether to measure it, in `runtime`. A loaded model needs its tokenizer.
    Raises CalibrationError for a text that cannot be read, EvaluationError for tasks, ModelError.
    """
    return evaluate_model(model_or_path, request, options, reporter, tokenizer=tokenizer)
