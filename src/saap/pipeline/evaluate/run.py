"""`saap eval`: measurements of one model, and of the dense one if requested."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saap.core.errors import CalibrationError, ConfigurationError, ModelError
from saap.core.evaluation_records import EvalReport, GenerationReport, Perplexity, SpeedReport, TaskResult
from saap.core.manifest import recorded_versions, typed_command
from saap.core.records import IntArray
from saap.core.storage import write_whole
from saap.core.vocabulary import VocabularyMap
from saap.data import texts
from saap.data.samples import leading_ids, token_stream
from saap.evaluation import generation
from saap.evaluation.chat import Conversations, chat_perplexity, check_conversations
from saap.evaluation.perplexity import bits_per_byte, perplexity
from saap.evaluation.speed import Source
from saap.evaluation.zero_shot import check_tasks, evaluate_tasks
from saap.models.loading.devices import multiplied_in, quick_float32_products, quick_products
from saap.models.loading.pretrained import load_tokenizer, model_without_weights
from saap.models.loading.references import ResolvedModel
from saap.models.walk.probe import check_runs
from saap.pipeline.evaluate.speed import compare_speeds
from saap.pipeline.shared.dense_model import (
    check_rows,
    check_same_tokens,
    keep_tokens_of,
    manifest_of,
    resolve_dense,
    tokens_of,
)
from saap.pipeline.shared.inputs import LoadedModel, RunOptions, open_model, resolve_with_tokenizer
from saap.pipeline.shared.progress import Reporter, Silent
from saap.pipeline.shared.stages import LOAD
from saap.reporting.tables import names_apart
from saap.settings.evaluate import EvalRequest, SpeedSettings, unread


def evaluate_model(
    source: str | Path | nn.Module,
    request: EvalRequest,
    options: RunOptions,
    reporter: Reporter | None = None,
    *,
    tokenizer: Any | None = None,
) -> EvalReport:
    """Run the measurements of `request`. Invalid requests are rejected before the weights are read.

    Raises CalibrationError for texts, EvaluationError for tasks, prompts and conversations, ModelError.
    """
    reporter = reporter if reporter is not None else Silent()
    prompts, conversations = check_request(request)
    opened, tokenizer = resolve_with_tokenizer(source, options, tokenizer)
    dense_ref = _dense_model(request, opened, reporter)
    reporter.stage("read the texts")
    streams = read_streams(request, tokenizer)
    run = _Evaluation(request, options, reporter, streams, conversations, prompts)
    run.check_conversations(tokenizer)
    vocabulary = tokens_of(opened) if isinstance(opened, ResolvedModel) else None
    measured = dense_ref if prompts or request.dense is not None else None  # otherwise its speed alone
    dense_run, dense_tokenizer = (run, None) if measured is None else run.of_dense(measured, tokenizer, vocabulary)
    reporter.stage(LOAD.title)
    loaded = run.opened(opened, tokenizer)
    more: dict[str, Any] = {"command": typed_command(), "versions": recorded_versions()}
    with quick_float32_products():
        report = run.measure(loaded)
        dense = None
        if measured is not None:
            reporter.stage(f"load the dense model {measured.source}")
            dense = dense_run.opened(measured, dense_tokenizer, loaded.tokenizer)
            if request.dense is not None:
                more["dense"] = dense_run.measure(dense)
        if request.speed is not None:
            more["speed"] = run.compare_speeds(request.speed, opened, loaded, dense_ref, dense)
        if request.prompts is not None:
            if dense is not None:  # which itself has fewer tokens from here on
                keep_tokens_of(dense.model, vocabulary)
            more["generation"] = run.generate(loaded, dense)
    return report.model_copy(update=more)


def _dense_model(
    request: EvalRequest, evaluated: nn.Module | ResolvedModel, reporter: Reporter
) -> ResolvedModel | None:
    """The dense model, found before any weights are read. Raises ModelError.

    A dense model that only the manifest specifies is skipped if it is not on this machine.
    """
    if request.dense is None and request.speed is None and request.prompts is None:
        return None
    manifest = manifest_of(evaluated) if isinstance(evaluated, ResolvedModel) else None
    try:
        return resolve_dense(request, manifest)
    except ModelError as error:
        if request.dense is not None:
            raise
        reporter.note(f"the dense model is not measured: {error}")
        return None


def check_request(request: EvalRequest, *, fetch: bool = True) -> tuple[Sequence[generation.Prompt], Conversations]:
    """Reject invalid requests without loading a model. Returns the requested prompts and conversations.

    fetch: whether the rows of tasks are fetched from the hub for it.
    """
    for measured, names, flags in (  # not by the settings: --generation names the prompts after these are checked
        ([request.prompts], ("generated_tokens", "seed"), "--generation or --prompts"),
        ([request.prompts, request.dense, request.speed], ("dense_revision", "dense_trust_remote_code"), "--dense"),
    ):
        if not any(measured) and (given := request.flags_changed(*names)):
            raise ConfigurationError(*unread(given, flags))
    if request.speed is not None:
        request.speed.runtime.check()
    if request.tasks:
        check_tasks(request.tasks, request.task_data, request.limit, fetch=fetch)
    for source in request.texts:
        if source != generation.BUNDLED:
            texts.check_source(source)
    conversations = {} if request.chat is None else texts.read_conversations(request.chat)
    return () if request.prompts is None else generation.read_prompts(request.prompts), conversations


def read_streams(request: EvalRequest, tokenizer: Any | None) -> dict[str, IntArray]:
    """Token ids of the texts by name. Raises CalibrationError."""
    streams = {}
    for name in request.texts:
        if name == generation.BUNDLED:
            documents = [texts.evaluation_text()]
        else:
            documents = list(texts.read_documents(name, tokenizer=tokenizer, purpose=texts.Purpose.EVALUATION))
        streams[name] = token_stream(documents, tokenizer)
        if len(streams[name]) < request.window:
            raise CalibrationError(
                f"{name} has {len(streams[name]):,} tokens, fewer than one window of {request.window}",
                "Give a longer text or a smaller --window",
            )
    if tokenizer is None and (request.tasks or request.chat or request.prompts):
        token_stream((), tokenizer)  # raises for a missing tokenizer
    return streams


def requested_perplexity(model: nn.Module, tokenizer: Any | None, request: EvalRequest, ids: IntArray) -> Perplexity:
    """Perplexity in the windows of a request."""
    # a stride of one window means consecutive windows, also where a leading token takes a place in each
    stride = None if request.stride == request.window else request.stride
    return perplexity(
        model, ids, window=request.window, stride=stride, max_tokens=request.max_tokens,
        leading=leading_ids(tokenizer, bos=request.bos),
    )  # fmt: skip


def ask_tasks(model: nn.Module, tokenizer: Any, request: EvalRequest, reporter: Reporter) -> dict[str, TaskResult]:
    """The zero-shot tasks of a request."""
    device = next(model.parameters()).device
    with multiplied_in(quick_products(device) if request.rounded else None, device):
        return evaluate_tasks(
            model, tokenizer, request.tasks, data=request.task_data, limit=request.limit, progress=reporter.advance
        )


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """Measurements that apply to the model and the dense one alike."""

    request: EvalRequest
    options: RunOptions
    reporter: Reporter
    streams: Mapping[str, IntArray]
    conversations: Conversations
    prompts: Sequence[generation.Prompt]

    def check_conversations(self, tokenizer: Any | None) -> None:
        """Raise EvaluationError for conversations that a model with this tokenizer cannot be measured on."""
        if self.conversations:
            check_conversations(tokenizer, self.conversations)

    def of_dense(
        self, dense: ResolvedModel, tokenizer: Any | None, vocabulary: VocabularyMap | None
    ) -> tuple[_Evaluation, Any | None]:
        """The same measurements of the dense model, and its tokenizer. Raises ModelError for other tokens.

        tokenizer: of the evaluated model. vocabulary: the tokens that it has kept, if some were removed.
        """
        own = load_tokenizer(dense)
        if own is None and vocabulary is None:
            own = tokenizer
        elif self.prompts and vocabulary is None:
            check_same_tokens(tokenizer, own, dense.source)
        if self.prompts and vocabulary is not None:
            check_rows(model_without_weights(dense), vocabulary)
        if self.request.dense is None:
            return self, own
        # its own tokens, since another model may split the texts otherwise
        run = replace(self, streams=read_streams(self.request, own))
        run.check_conversations(own)
        return run, own

    def opened(
        self, source: nn.Module | ResolvedModel, tokenizer: Any | None, other_tokenizer: Any | None = None
    ) -> LoadedModel:
        """Load a model, and check that it can process the longest prompt and its continuation."""
        loaded = open_model(source, self.options, tokenizer, computes_in_dtype=True)
        reads = loaded.tokenizer or other_tokenizer
        generation.check_prompts(loaded.model, reads, self.prompts, self.request.generated_tokens)
        return loaded

    def measure(self, loaded: LoadedModel) -> EvalReport:
        """Perplexities, tasks and conversations of one model."""
        model, tokenizer, name = loaded.model, loaded.tokenizer, loaded.ref.source
        found: dict[str, Any] = {"perplexity": {}}
        for text, ids in self.streams.items():
            self.reporter.stage(f"perplexity of {name} on {text}")
            check_runs(model, torch.from_numpy(ids[None, : self.request.window]).to(next(model.parameters()).device))
            value = requested_perplexity(model, tokenizer, self.request, ids)
            if tokenizer is not None:
                bits = bits_per_byte(value.value, ids[: self.request.max_tokens], tokenizer)
                value = value.model_copy(update={"bits_per_byte": bits})
            found["perplexity"][text] = value
        if self.request.tasks:
            self.reporter.stage(f"zero-shot tasks of {name}")
            found["tasks"] = ask_tasks(model, tokenizer, self.request, self.reporter)
        if self.conversations:
            self.reporter.stage(f"conversations of {name}")
            found["chat"] = chat_perplexity(model, tokenizer, self.conversations)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        return EvalReport(model=name, revision=loaded.ref.revision, parameters=parameters, **found)

    def generate(self, loaded: LoadedModel, dense: LoadedModel | None) -> GenerationReport:
        """Generated text and known facts of the models. The dense model evaluates both."""
        tokenizer, evaluator = loaded.tokenizer, None if dense is None else dense.model
        opens = [prompt.prompt for prompt in self.prompts if prompt.answer is None]
        models = {"pruned": loaded} if dense is None else {"pruned": loaded, "dense": dense}
        figures: dict[str, dict[str, Any]] = {name: {} for name in models}
        samples: dict[str, dict[str, dict[str, str]]] = {}
        agreed = None
        for mode in ("greedy", "sampled") if opens else ():
            for name, one in models.items():
                self.reporter.stage(f"generate with {one.ref.source}, {mode}")
                written = generation.write(
                    one.model, tokenizer, opens, tokens=self.request.generated_tokens, sampled=mode == "sampled",
                    seed=self.request.seed,
                )  # fmt: skip
                figures[name][mode] = generation.generation_figures(
                    written, evaluator, tokenizer, progress=self.reporter.advance
                )
                for text in written:
                    samples.setdefault(mode, {}).setdefault(text.prompt, {})[name] = text.text
                if one is dense and mode == "greedy":
                    agreed = generation.token_agreement(loaded.model, written, tokenizer)
        return GenerationReport(
            figures=figures["pruned"],
            dense_figures=figures.get("dense") or None,
            token_agreement=agreed,
            cloze=generation.cloze(loaded.model, tokenizer, self.prompts),
            dense_cloze=None if evaluator is None else generation.cloze(evaluator, tokenizer, self.prompts),
            samples=samples,
        )

    def compare_speeds(
        self, settings: SpeedSettings, opened: nn.Module | ResolvedModel, loaded: LoadedModel,
        dense_ref: ResolvedModel | None, dense: LoadedModel | None,
    ) -> SpeedReport:  # fmt: skip
        """Tokens per second of the model, compared with the dense one. dense: if it is loaded already."""
        in_memory: bool = settings.runtime.load().in_memory
        if dense_ref is not None and dense is None and in_memory:
            self.reporter.stage(f"load the dense model {dense_ref.source}")
            dense = open_model(dense_ref, self.options, computes_in_dtype=True)
        models: list[Source] = [
            one.model if in_memory and one is not None else given.path if isinstance(given, ResolvedModel) else given
            for given, one in ((opened, loaded), (dense_ref, dense))
            if given is not None
        ]
        refs = [(loaded.ref.source, loaded.ref.revision)]
        refs += [] if dense_ref is None else [(dense_ref.source, dense_ref.revision)]
        self.reporter.stage(f"speed in {settings.runtime}")
        return compare_speeds(list(zip(names_apart(refs), models, strict=True)), settings)


def write_report(path: Path, data: Mapping[str, Any]) -> None:
    """Write a report as JSON atomically. Raises OutputError."""
    write_whole(path, (json.dumps(data, indent=1) + "\n").encode())
