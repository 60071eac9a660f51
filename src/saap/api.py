"""The public functions: the stages one by one, and `prune`, which runs them in order."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from saap.core.errors import ConfigurationError
from saap.core.records import ImportanceScores, Layout, ModelGraph, Role, StructurePlan
from saap.data.samples import Calibration, calibration_set
from saap.discovery import discover as _discover
from saap.estimation.estimate import estimate as _estimate
from saap.estimation.estimate import unit_scores
from saap.evaluation.generation import BUNDLED
from saap.models.loading.devices import computable, require_values
from saap.models.loading.pretrained import model_ref
from saap.models.walk.backend import Backend
from saap.models.walk.offload import offloaded
from saap.models.walk.spill import Spill
from saap.pipeline.evaluate.run import EvalReport, evaluate_model
from saap.pipeline.prune.result import PruneResult
from saap.pipeline.prune.run import run_prune
from saap.pipeline.recover.result import RecoverResult
from saap.pipeline.recover.run import run_recover
from saap.pipeline.shared.inputs import RunOptions, open_model
from saap.pipeline.shared.memory import open_within
from saap.pipeline.shared.progress import Reporter
from saap.settings.measure import EvalRequest, SpeedSettings
from saap.settings.prune import (
    Aggregation,
    Effort,
    ElementOrder,
    FusionScope,
    GgufType,
    PrunableRole,
    PruneConfig,
    RuntimeName,
    SkipLayers,
)
from saap.settings.recover import RecoverConfig, Tuning
from saap.settings.registry import Importance, Method, Strategy
from saap.structure_search.budget import budget_for_ratio
from saap.structure_search.plan import SearchSpace
from saap.structure_search.plan import search as _search


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


def estimate(
    model: str | Path | nn.Module,
    graph: ModelGraph,
    calibration: Calibration,
    *,
    tokenizer: Any | None = None,
    samples: int = 50,
    sample_length: int = 128,
    roles: Collection[Role | str] = (Role.FFN, Role.ATTENTION),
    element_order: ElementOrder | str = ElementOrder.SECOND,
    aggregation: Aggregation | str = Aggregation.SUM,
    seed: int = 0,
    bos: bool = True,
    max_memory: int | None = None,
) -> ImportanceScores:
    """Vector-wise and element-wise importance of every unit over the calibration samples (SAAP, estimation stage).

    model: a loaded model, or what `saap prune` takes. calibration: names and files as on the command line, texts (both
    need a tokenizer), or token ids of shape (samples, length). bos: whether samples of text begin with the tokenizer's
    BOS token, if it puts one before texts. max_memory: bytes that the process may have resident;
    for it the weights of a model given by its folder may stay in the files.
    Raises CalibrationError, ModelError, NonFiniteLossError, ConfigurationError for a limit that is too small.
    """
    if isinstance(model, nn.Module):
        require_values(model)
        opened = computable(model)
    else:
        config = PruneConfig(pruning_ratios=(0,), restore=False, sample_length=sample_length)
        loaded = open_within(model, config, RunOptions(max_memory=max_memory), tokenizer)
        opened, tokenizer = loaded.model, loaded.tokenizer
    tokens = calibration_set(calibration, tokenizer, samples=samples, length=sample_length, seed=seed, bos=bos)
    with TemporaryDirectory(prefix="saap-") as folder:
        return _estimate(
            Backend(opened, graph, spill=Spill(Path(folder)) if offloaded(opened) is not None else None),
            tokens,
            roles=[Role(role) for role in roles],
            element_order=ElementOrder(element_order),
            aggregation=Aggregation(aggregation),
        )


def search(
    graph: ModelGraph,
    scores: ImportanceScores,
    *,
    pruning_ratio: float,
    strategy: Strategy | str = Strategy.UNIFORM,
    importance: Importance | str = Importance.FUSED,
    fusion_scope: FusionScope | str = FusionScope.LAYER_ROLE,
    layout: Layout | str = Layout.ADAPTIVE,
    roles: Sequence[PrunableRole | str] = (PrunableRole.FFN, PrunableRole.ATTENTION),
    skip_layers: tuple[int, int] | None = None,
    align: int = 32,
) -> StructurePlan:
    """A structure plan from scores alone, without measuring candidates (SAAP, adaptive structure search).

    pruning_ratio: fraction of the decoder blocks' parameters. skip_layers: how many blocks to spare (first, last).
    The strategy `adaptive` measures candidates and therefore needs `prune`. Raises TargetError.
    """
    space = SearchSpace(
        roles=tuple(PrunableRole(role) for role in roles),
        layout=Layout(layout),
        align=align,
        skip_layers=None if skip_layers is None else SkipLayers(first=skip_layers[0], last=skip_layers[1]),
    )
    units = unit_scores(scores, graph, Importance(importance), FusionScope(fusion_scope))
    return _search(graph, units, budget_for_ratio(graph, pruning_ratio), space, Strategy(strategy))


def recover(
    model: str | Path,
    *,
    out: str | Path | None = None,
    data: Sequence[str | Path] = ("mixed",),
    overwrite: bool = False,
    work_dir: str | Path | None = None,
    keep_work: bool = False,
    tuning: Tuning | str = Tuning.GROUPWISE,
    bits: int = 4,
    group_size: int = 32,
    error_feedback: bool = False,
    rank: int = 16,
    alpha: float = 16.0,
    scales: bool = True,
    teacher: str | Path | None = None,
    dense_revision: str | None = None,
    dense_trust_remote_code: bool = False,
    distillation: float | None = None,
    length: int = 512,
    bos: bool = True,
    batch: int = 1,
    micro_batch: int = 1,
    learning_rate: float = 1e-3,
    warm_up: float = 0.05,
    clip: float = 1.0,
    max_steps: int | None = None,
    max_tokens: int | None = None,
    max_minutes: float | None = None,
    validate_every: int = 60,
    validation_samples: int = 8,
    patience: int = 5,
    gradient_checkpointing: bool = True,
    exact_products: bool = False,
    shard: bool = False,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> RecoverResult:
    """Tune a model on text with quantised weights, and write it to `out` if that is given (SAAP, recovery stage).

    model: a folder that `prune` has written, or anything else that `saap recover` takes. The arguments are the flags
    of `saap recover`. Raises SaapError.
    """
    config = RecoverConfig(
        data=tuple(str(source) for source in data), tuning=Tuning(tuning), bits=bits, group_size=group_size,
        error_feedback=error_feedback, rank=rank, alpha=alpha, scales=scales,
        teacher=None if teacher is None else str(teacher), dense_revision=dense_revision,
        dense_trust_remote_code=dense_trust_remote_code, distillation=distillation, length=length, bos=bos,
        batch=batch, micro_batch=micro_batch, learning_rate=learning_rate,
        warm_up=warm_up, clip=clip, max_steps=max_steps, max_tokens=max_tokens, max_minutes=max_minutes,
        validate_every=validate_every, validation_samples=validation_samples, patience=patience,
        gradient_checkpointing=gradient_checkpointing, exact_products=exact_products, shard=shard, seed=seed,
    )  # fmt: skip
    options = RunOptions(
        out=None if out is None else Path(out), overwrite=overwrite,
        work_dir=None if work_dir is None else Path(work_dir), keep_work=keep_work, device=device, dtype=dtype,
        revision=revision, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    return run_recover(model, config, options, reporter)


def prune(
    model_or_path: str | Path | nn.Module,
    *,
    pruning_ratio: float | None = None,
    target_params: int | None = None,
    target_size: int | None = None,
    target_speedup: float | None = None,
    runtime: RuntimeName | str = RuntimeName.TRANSFORMERS,
    quantization: GgufType | str = GgufType.F16,
    plan: str | Path | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    layout: Layout | str = Layout.ADAPTIVE,
    roles: Sequence[PrunableRole | str] = (PrunableRole.FFN, PrunableRole.ATTENTION),
    skip_layers: tuple[int, int] | None = None,
    align: int = 32,
    calibration: Calibration = "mixed",
    samples: int = 50,
    sample_length: int = 128,
    refit_tokens: int | None = None,
    bos: bool = True,
    strategy: Strategy | str = Strategy.ADAPTIVE,
    importance: Importance | str = Importance.FUSED,
    fusion_scope: FusionScope | str = FusionScope.LAYER_ROLE,
    restore: bool | None = None,
    method: Method | str = Method.SAAP,
    effort: Effort | str = Effort.DEFAULT,
    seed: int = 0,
    tokenizer: Any | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    max_memory: int | None = None,
    device_map: str | None = None,
    reporter: Reporter | None = None,
) -> PruneResult:
    """Prune a model: discover, estimate, search, cut, restore, check, and write it to `out` if that is given.

    model_or_path: a loaded model (any class with forward(input_ids); it is not changed, and of float16 it is a copy in
    float32 that is pruned), or what `saap prune` takes.
    pruning_ratio: fraction of the decoder blocks' parameters; target_params: of the whole model; target_size: bytes of
    the weights as written; target_speedup: of decoding, measured in `runtime` (llama.cpp: with weights of the type
    `quantization`); exactly one of them, or `plan`. calibration: names and files, texts, or token ids (samples,
    length). method: a baseline instead, which restores only if `restore` says so. max_memory: bytes that may be
    resident; for it the weights of a model given by its folder may stay in the files, those of the result too.
    device_map: auto, balanced or sequential, for blocks over several devices; a loaded model with a device map is taken
    as it lies. The other arguments are the flags of `saap prune`. Raises SaapError.
    """
    if skip_layers is not None and len(skip_layers) != 2:
        raise ConfigurationError(f"skip_layers {skip_layers!r} is not understood", "Give (first, last), e.g. (4, 2)")
    config = PruneConfig(
        pruning_ratios=() if pruning_ratio is None else (pruning_ratio,),
        target_parameters=target_params,
        target_bytes=target_size,
        target_speedup=target_speedup,
        runtime=RuntimeName(runtime),
        gguf_type=GgufType(quantization),
        plan=None if plan is None else Path(plan),
        calibration=(str(calibration),) if isinstance(calibration, (str, Path)) else ("given from Python",),
        samples=samples,
        sample_length=sample_length,
        refit_tokens=refit_tokens,
        bos=bos,
        layout=Layout(layout),
        roles=tuple(PrunableRole(role) for role in roles),
        skip_layers=None if skip_layers is None else SkipLayers(first=skip_layers[0], last=skip_layers[1]),
        align=align,
        strategy=Strategy(strategy),
        importance=Importance(importance),
        fusion_scope=FusionScope(fusion_scope),
        restore=Method(method) is Method.SAAP if restore is None else restore,
        method=Method(method),
        effort=Effort(effort),
        seed=seed,
    )
    options = RunOptions(
        out=None if out is None else Path(out),
        overwrite=overwrite,
        device=device,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        max_memory=max_memory,
        device_map=device_map,
    )
    (result,) = run_prune(model_or_path, config, options, reporter, calibration=calibration, tokenizer=tokenizer)
    return result


def evaluate(
    model_or_path: str | Path | nn.Module,
    *,
    texts: Sequence[str | Path] = (BUNDLED,),
    tokenizer: Any | None = None,
    window: int = 512,
    stride: int | None = None,
    bos: bool = True,
    max_tokens: int | None = None,
    tasks: Sequence[str] = (),
    task_data: str | Path | None = None,
    limit: int | None = None,
    speed: bool = False,
    against: str | Path | None = None,
    dense_revision: str | None = None,
    dense_trust_remote_code: bool = False,
    runtime: RuntimeName | str = RuntimeName.TRANSFORMERS,
    quantization: GgufType | str = GgufType.F16,
    device: str = "auto",
    reporter: Reporter | None = None,
) -> EvalReport:
    """Perplexity of a model on texts, and its accuracy on zero-shot tasks.

    texts: names of data sets, files, or `bundled`: a text of several kinds that is never calibrated on. window: tokens
    of each window; stride: from one window's start to the next's, None for windows that are read on their own; bos:
    whether each begins with the tokenizer's BOS token, if it puts one before texts.
    max_tokens: only the first of each text. tasks: names in lm-evaluation-harness; task_data: a folder with files
    TASK.SPLIT.jsonl instead of the hub; limit: only the first questions of each. speed: tokens per second in
    `runtime` (llama.cpp: of the type `quantization`), beside `against` or the model it was made from, if that is on
    this machine; dense_revision, dense_trust_remote_code: of that one. A loaded model needs its tokenizer.
    Raises CalibrationError for a text that cannot be read, EvaluationError for tasks, ModelError.
    """
    request = EvalRequest(
        texts=tuple(str(text) for text in texts),
        window=window,
        stride=stride,
        bos=bos,
        max_tokens=max_tokens,
        tasks=tuple(tasks),
        task_data=None if task_data is None else Path(task_data),
        limit=limit,
        speed=SpeedSettings(runtime=RuntimeName(runtime), gguf_type=GgufType(quantization)) if speed else None,
        against=None if against is None else str(against),
        dense_revision=dense_revision,
        dense_trust_remote_code=dense_trust_remote_code,
    )
    return evaluate_model(model_or_path, request, RunOptions(device=device), reporter, tokenizer=tokenizer)
