"""`saap eval`: every measurement of one model, and of the dense one where that is requested."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saap.core.errors import CalibrationError, ConfigurationError, ModelError
from saap.core.manifest import recorded_versions, typed_command
from saap.core.records import IntArray
from saap.core.storage import write_whole
from saap.data.samples import leading_ids, token_stream
from saap.data.texts import Purpose, evaluation_text, read_conversations, read_documents
from saap.evaluation.chat import ChatPerplexity, chat_perplexity
from saap.evaluation.generation import (
    BUNDLED,
    ClozeFigures,
    GenerationFigures,
    Prompt,
    check_prompts,
    cloze,
    generation_figures,
    read_prompts,
    token_agreement,
    write,
)
from saap.evaluation.perplexity import Perplexity, perplexity
from saap.evaluation.zero_shot import TaskResult, check_tasks, evaluate_tasks, mean_accuracy
from saap.models.loading.devices import quick_float32_products, rounded_products
from saap.models.loading.pretrained import load_tokenizer
from saap.models.loading.references import ResolvedModel, resolve_model
from saap.models.walk.probe import check_runs
from saap.pipeline.evaluate.speed import Source, SpeedReport, check_settings, measure_beside
from saap.pipeline.shared.dense_model import DenseChoice, manifest_of, resolve_dense
from saap.pipeline.shared.inputs import LoadedModel, RunOptions, open_model
from saap.pipeline.shared.progress import Reporter, Silent
from saap.pipeline.shared.stages import LOAD
from saap.reporting.tables import names_apart
from saap.settings.measure import EvalRequest, SpeedSettings
from saap.settings.prune import RuntimeName

MODES = ("greedy", "sampled")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationReport:
    """What a model wrote, by mode, and what was measured of it. samples: of each mode, prompt -> model -> text."""

    figures: Mapping[str, GenerationFigures]
    dense_figures: Mapping[str, GenerationFigures] | None
    token_agreement: float | None
    cloze: ClozeFigures | None
    dense_cloze: ClozeFigures | None
    samples: Mapping[str, Mapping[str, Mapping[str, str]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """What was measured of a model, by the name of the text or task. dense: the same of the dense model, if named."""

    model: str
    parameters: int
    perplexity: dict[str, Perplexity] = field(default_factory=dict)
    tasks: dict[str, TaskResult] = field(default_factory=dict)
    generation: GenerationReport | None = None
    chat: ChatPerplexity | None = None
    speed: SpeedReport | None = None
    dense: EvalReport | None = None
    command: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    revision: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able data; numbers that are not finite become None, which JSON can say."""
        data = finite(dataclasses.asdict(self))
        for part, report in ((data, self), (data["dense"], self.dense)):
            if report is not None and report.tasks:
                part["tasks_mean"] = mean_accuracy(report.tasks)
        return dict(data)


def evaluate_model(
    source: str | Path | nn.Module,
    request: EvalRequest,
    options: RunOptions,
    reporter: Reporter | None = None,
    *,
    tokenizer: Any | None = None,
) -> EvalReport:
    """Measure what `request` names. Everything that can be refused is refused before the weights are read.

    Raises CalibrationError for texts, EvaluationError for tasks, prompts and conversations, ModelError.
    """
    reporter = reporter if reporter is not None else Silent()
    prompts = check_request(request)
    opened: nn.Module | ResolvedModel
    if isinstance(source, nn.Module):
        opened, others = source, _other_models(request, None, reporter)
    else:
        opened = resolve_model(source, revision=options.revision, trust_remote_code=options.trust_remote_code)
        tokenizer = tokenizer if tokenizer is not None else load_tokenizer(opened)
        others = _other_models(request, opened, reporter)
    reporter.stage("read the texts")
    streams = read_streams(request, tokenizer)
    conversations = () if request.chat is None else read_conversations(request.chat)
    reporter.stage(LOAD.title)
    loaded = open_model(opened, options, tokenizer, computes_in_dtype=True)
    check_prompts(loaded.model, loaded.tokenizer, prompts, request.generated_tokens)
    with quick_float32_products():
        report = _measure(loaded, request, streams, conversations, reporter)
        dense = None
        if others.dense is not None and (prompts or request.dense is not None):
            reporter.stage(f"load the dense model {others.dense.source}")
            dense = open_model(others.dense, options, computes_in_dtype=True)
            check_prompts(dense.model, dense.tokenizer or loaded.tokenizer, prompts, request.generated_tokens)
            if request.dense is not None:
                dense_report = _measure(dense, request, streams, conversations, reporter)
                report = dataclasses.replace(report, dense=dense_report)
        if request.prompts is not None:
            generation = _generation(loaded, dense, prompts, request, reporter)
            report = dataclasses.replace(report, generation=generation)
        if request.speed is not None:
            speed = _speed(opened, loaded, others, dense, request.speed, options, reporter)
            report = dataclasses.replace(report, speed=speed)
    command = typed_command()
    return dataclasses.replace(report, command=command, versions=recorded_versions())


@dataclass(frozen=True, slots=True)
class _Others:
    """The models besides the evaluated one. against: to compare its speed with."""

    dense: ResolvedModel | None = None
    against: ResolvedModel | None = None


def _other_models(request: EvalRequest, evaluated: ResolvedModel | None, reporter: Reporter) -> _Others:
    """Find them all before any weights are read. Raises ModelError.

    A dense model that nobody has named is left out where it is not on this machine.
    """
    writes = request.prompts is not None
    if request.dense is None and request.speed is None and not writes:
        return _Others()
    manifest = None if evaluated is None else manifest_of(evaluated)
    choice, other = DenseChoice.pair(request)
    dense = None
    against = None if other is None else resolve_dense(other, manifest)
    if request.dense is not None or writes or against is None:
        try:
            dense = resolve_dense(choice, manifest)
        except ModelError as error:
            if request.dense is not None:
                raise
            reporter.note(f"nothing is measured of the dense model: {error}")
    return _Others(dense, dense if against is None else against)


def check_request(request: EvalRequest) -> tuple[Prompt, ...]:
    """Refuse what needs no model to be refused. Returns the requested prompts."""
    _check_speed(request)
    if request.tasks:
        check_tasks(request.tasks, request.task_data, request.limit)
    return () if request.prompts is None else read_prompts(request.prompts)


def _check_speed(request: EvalRequest) -> None:
    if request.speed is not None:
        check_settings(request.speed)
    elif request.against is not None:
        raise ConfigurationError("--against has nothing to be measured", "Add --speed, or use --dense")


def read_streams(request: EvalRequest, tokenizer: Any | None) -> dict[str, IntArray]:
    """Token ids of the texts by name. Raises CalibrationError."""
    streams = {}
    for name in request.texts:
        if name == BUNDLED:
            documents: tuple[str, ...] = (evaluation_text(),)
        else:
            documents = read_documents(name, tokenizer=tokenizer, purpose=Purpose.EVALUATION)
        ids = token_stream(documents, tokenizer)
        if len(ids) < request.window:
            raise CalibrationError(
                f"{name} has {len(ids):,} tokens, fewer than one window of {request.window}",
                "Give a longer text or a smaller --window",
            )
        streams[name] = ids
    if tokenizer is None and (request.tasks or request.chat or request.prompts):
        token_stream((), tokenizer)
    return streams


def _measure(
    loaded: LoadedModel,
    request: EvalRequest,
    streams: Mapping[str, IntArray],
    conversations: Sequence[Sequence[dict[str, Any]]],
    reporter: Reporter,
) -> EvalReport:
    """Perplexities, tasks and conversations of one model."""
    model = loaded.model
    found = {}
    for name, ids in streams.items():
        reporter.stage(f"perplexity of {loaded.ref.source} on {name}")
        first = torch.from_numpy(ids[None, : request.window]).to(next(model.parameters()).device)
        check_runs(model, first)
        found[name] = requested_perplexity(model, loaded.tokenizer, request, ids)
    tasks: dict[str, TaskResult] = {}
    if request.tasks:
        reporter.stage(f"zero-shot tasks of {loaded.ref.source}")
        tasks = ask_tasks(model, loaded.tokenizer, request, reporter)
    chat = None
    if conversations:
        reporter.stage(f"conversations of {loaded.ref.source}")
        chat = chat_perplexity(model, loaded.tokenizer, conversations)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return EvalReport(
        model=loaded.ref.source, revision=loaded.ref.revision, parameters=parameters, perplexity=found, tasks=tasks,
        chat=chat,
    )  # fmt: skip


def requested_perplexity(model: nn.Module, tokenizer: Any | None, request: EvalRequest, ids: IntArray) -> Perplexity:
    """Perplexity in the windows of a request."""
    return perplexity(
        model, ids, window=request.window, stride=request.stride, max_tokens=request.max_tokens,
        leading=leading_ids(tokenizer, bos=request.bos),
    )  # fmt: skip


def ask_tasks(model: nn.Module, tokenizer: Any, request: EvalRequest, reporter: Reporter) -> dict[str, TaskResult]:
    """The zero-shot tasks of a request."""
    with rounded_products(next(model.parameters()).device) if request.rounded else nullcontext():
        return evaluate_tasks(
            model, tokenizer, request.tasks, data=request.task_data, limit=request.limit, progress=reporter.advance
        )


def _generation(
    loaded: LoadedModel, dense: LoadedModel | None, prompts: Sequence[Prompt], request: EvalRequest, reporter: Reporter
) -> GenerationReport:
    opens = [prompt.prompt for prompt in prompts if prompt.answer is None]
    figures: dict[str, GenerationFigures] = {}
    dense_figures: dict[str, GenerationFigures] = {}
    samples: dict[str, dict[str, dict[str, str]]] = {}
    agreed = None
    judge_model = None if dense is None else dense.model
    for mode in MODES if opens else ():
        for name, one, found in (("pruned", loaded, figures), ("dense", dense, dense_figures)):
            if one is None:
                continue
            reporter.stage(f"let {one.ref.source} write, {mode}")
            written = write(
                one.model, loaded.tokenizer, opens, tokens=request.generated_tokens, sampled=mode == "sampled",
                seed=request.seed,
            )  # fmt: skip
            found[mode] = generation_figures(written, judge_model, loaded.tokenizer, progress=reporter.advance)
            for text in written:
                samples.setdefault(mode, {}).setdefault(text.prompt, {})[name] = text.text
            if one is dense and mode == "greedy":
                agreed = token_agreement(loaded.model, written, loaded.tokenizer)
    return GenerationReport(
        figures=figures,
        dense_figures=dense_figures or None,
        token_agreement=agreed,
        cloze=cloze(loaded.model, loaded.tokenizer, prompts),
        dense_cloze=None if judge_model is None else cloze(judge_model, loaded.tokenizer, prompts),
        samples=samples,
    )


def _speed(
    source: nn.Module | ResolvedModel,
    loaded: LoadedModel,
    others: _Others,
    dense: LoadedModel | None,
    settings: SpeedSettings,
    options: RunOptions,
    reporter: Reporter,
) -> SpeedReport:
    """Tokens per second of the model, compared with another one. dense: where that is loaded already."""
    in_memory = settings.runtime is RuntimeName.TRANSFORMERS
    given: Source = source if isinstance(source, nn.Module) else source.path
    other = others.against
    names = names_apart([(ref.source, ref.revision) for ref in (loaded.ref, other) if ref is not None])
    models: list[tuple[str, Source]] = [(names[0], loaded.model if in_memory else given)]
    if other is not None:
        reporter.stage(f"load {other.source} to measure speed against")
        if in_memory and (dense is None or other != others.dense):
            dense = open_model(other, options, computes_in_dtype=True)
        models.append((names[1], dense.model if in_memory and dense is not None else other.path))
    reporter.stage(f"speed in {settings.runtime}")
    return measure_beside(models, settings)


def finite(value: Any) -> Any:
    """The same data with None in place of numbers that are not finite, which JSON cannot say."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_report(path: Path, data: Mapping[str, Any]) -> None:
    """Write a report as JSON, whole or not at all. Raises OutputError."""
    write_whole(path, (json.dumps(data, indent=1) + "\n").encode())
