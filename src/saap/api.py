"""The public functions: the stages one by one, and `prune`, which runs them in order.

Those that take settings take every field of the models in their signature by name; `saap/__init__.pyi` spells that out.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel
from torch import nn

from saap.core.errors import ConfigurationError
from saap.core.evaluation_records import EvalReport
from saap.core.records import ImportanceScores, ModelGraph, StructurePlan
from saap.data.samples import Calibration, calibration_set
from saap.discovery import discover as _discover
from saap.estimation.estimate import estimate as _estimate
from saap.estimation.estimate import unit_scores
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
from saap.pipeline.shared.memory import open_within
from saap.pipeline.shared.progress import Reporter
from saap.settings.measure import EvalRequest
from saap.settings.prune import PruneConfig, unit_roles
from saap.settings.recover import RecoverConfig
from saap.settings.run import OPENS, RunOptions
from saap.settings.setting import Only, Setting, models_of, settings_of
from saap.structure_search.budget import budget_for_ratio
from saap.structure_search.plan import SearchSpace
from saap.structure_search.plan import search as _search

Result = TypeVar("Result")
GIVEN = "given from Python"
"""What stands in the records for texts or token ids that have no name."""
_SCORED = Only(
    ("samples", "sample_length", "roles", "importance", "element_order", "aggregation", "seed", "bos"),
    {"pruning_ratios": 0, "restore": False},
)
_SEARCHED = Only(
    ("pruning_ratios", "strategy", "importance", "fusion_scope", "layout", "roles", "skip_layers", "align"),
    {"strategy": "uniform"},
)
_TUNED_IN = Only(("out", "overwrite", "work_dir", "keep_work", *OPENS))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value goes that is given by name: the parameter that is a model, and the fields inside it."""

    parameter: str
    fields: tuple[str, ...]
    setting: Setting
    default: Any


def places_of(function: Callable[..., Any]) -> list[Place]:
    """The settings that a public function takes by name, in order."""
    return [place for name, (kind, only) in models_of(function).items() for place in _places(name, kind, only, ())]


def _places(parameter: str, kind: type[BaseModel], only: Only, outer: tuple[str, ...]) -> Iterator[Place]:
    for setting in settings_of(kind, only.fields):
        default = only.defaults.get(setting.field, setting.info.get_default(call_default_factory=True))
        yield Place(parameter, (*outer, setting.field), setting, default)
        if setting.only is not None and setting.inner is not None:
            yield from _places(parameter, setting.inner, setting.only, (*outer, setting.field))


def _with_settings(function: Callable[..., Result]) -> Callable[..., Result]:
    """A function that takes the fields of its models by name. Unknown names are a TypeError that lists them."""
    models = models_of(function)
    own = [one for name, one in inspect.signature(function).parameters.items() if name not in models]
    own_names = {one.name for one in own}
    places = {name: place for place in places_of(function) for name in place.setting.names if name not in own_names}

    @wraps(function)
    def call(*positional: Any, **given: Any) -> Result:
        unknown = given.keys() - places.keys() - own_names
        if unknown:
            raise TypeError(f"{function.__name__}() takes no argument named {', '.join(sorted(unknown))}")
        values: dict[str, Any] = {name: dict(only.defaults) for name, (_, only) in models.items()}
        taken: dict[tuple[str, ...], str] = {}
        for name, place in [(name, places[name]) for name in given if name not in own_names]:
            other = taken.setdefault((place.parameter, *place.fields), name)
            if other != name:
                raise ConfigurationError(f"{other} and {name} are the same setting", "Give one of the two")
            if name in place.setting.old:
                message = f"{name} is now {place.setting.name}; the old name will be gone in the next release"
                warnings.warn(message, FutureWarning, stacklevel=2)
            if given[name] is not False or place.setting.inner is None:
                _put(values[place.parameter], place, given[name])
        bound = inspect.Signature(own).bind(*positional, **{name: given[name] for name in own_names & given.keys()})
        return function(**bound.arguments, **{name: kind(**values[name]) for name, (kind, _) in models.items()})

    return call


def _put(values: dict[str, Any], place: Place, value: Any) -> None:
    """Put a value in its place; True for a model inside stands for its defaults."""
    *outer, last = place.fields
    for field in outer:
        values = values.setdefault(field, {})
    if value is True and place.setting.inner is not None:
        values.setdefault(last, {})
    else:
        values[last] = value


def discover(model: str | Path | nn.Module, *, finer_heads: bool = False) -> ModelGraph:
    """Find the coupled structures of a model by tracing it; the model is not changed.

    model: a loaded model (also of a class of your own), or what `saap prune` takes. finer_heads: with the query heads
    inside each KV group as groups of their own (role `query`).
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
    """Vector-wise and element-wise importance of every unit over the calibration samples (SAAP, estimation stage).

    model: a loaded model, or what `saap prune` takes. calibration: names and files as on the command line, texts (both
    need a tokenizer), or token ids of shape (samples, length). max_memory: bytes that the process may have resident;
    for it the weights of a model given by its folder may stay in the files.
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
        length=config.preset_settings.sample_length,
        seed=config.seed,
        bos=config.bos,
    )
    with TemporaryDirectory(prefix="saap-") as folder:
        return _estimate(
            Backend(opened, graph, spill=Spill(Path(folder)) if offloaded(opened) is not None else None),
            tokens,
            roles=unit_roles(config.roles),
            importance=config.importance,
            element_order=config.element_order,
            aggregation=config.aggregation,
        )


@_with_settings
def search(graph: ModelGraph, scores: ImportanceScores, config: Annotated[PruneConfig, _SEARCHED]) -> StructurePlan:
    """A structure plan from scores alone, without measuring candidates (SAAP, adaptive structure search).

    pruning_ratio: fraction of the decoder blocks' parameters. skip_layers: how many blocks to protect (first, last).
    The strategy `adaptive` measures candidates and therefore needs `prune`. Raises TargetError.
    """
    space = SearchSpace(roles=config.roles, layout=config.layout, align=config.align, skip_layers=config.skip_layers)
    units = unit_scores(scores, graph, config.importance, config.fusion_scope)
    return _search(graph, units, budget_for_ratio(graph, _only_ratio(config)), space, config.strategy)


@_with_settings
def recover(
    model: str | Path,
    config: RecoverConfig,
    options: Annotated[RunOptions, _TUNED_IN],
    *,
    reporter: Reporter | None = None,
) -> RecoverResult:
    """Tune a model on text with quantised weights, and write it to `output_dir` if given (SAAP, recovery stage).

    model: a folder that `prune` has written, or anything else that `saap recover` takes. The arguments are the flags
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

    model_or_path: a loaded model (any class with forward(input_ids); it is not changed, and of float16 it is a copy in
    float32 that is pruned), or what `saap prune` takes. Exactly one of pruning_ratio, target_params, target_size,
    target_speedup and plan. calibration: names and files, texts, or token ids (samples, length). max_memory: bytes that
    may be resident; for it the weights of a model given by its folder may stay in the files, those of the result too.
    device_map: auto, balanced or sequential, for blocks over several devices; a loaded model with a device map is taken
    as it lies. The other arguments are the flags of `saap prune`. Raises SaapError.
    """
    if len(config.pruning_ratios) > 1:
        raise ConfigurationError("prune() takes one pruning_ratio", "Call it for each, or use `saap prune`")
    named = (str(calibration),) if isinstance(calibration, (str, Path)) else (GIVEN,)
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
    """Perplexity of a model on texts, its accuracy on zero-shot tasks, what it writes, and its speed.

    texts: names of data sets, files, or `bundled`: a text of several kinds that is never calibrated on. tasks: names in
    lm-evaluation-harness. speed: whether to measure it, in `runtime`. A loaded model needs
    its tokenizer.
    Raises CalibrationError for a text that cannot be read, EvaluationError for tasks, ModelError.
    """
    return evaluate_model(model_or_path, request, options, reporter, tokenizer=tokenizer)


def _only_ratio(config: PruneConfig) -> float:
    if len(config.pruning_ratios) != 1:
        raise ConfigurationError("search() takes one pruning_ratio", "Call it for each")
    return config.pruning_ratios[0]
