"""Recovery of a checkpoint: read, quantise, train, merge, check, write."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saap.core.errors import ModelError
from saap.core.manifest import RunManifest
from saap.discovery.blocks import find_blocks
from saap.evaluation.perplexity import perplexities
from saap.export.huggingface import FolderParts, write_recovered
from saap.export.placing import check_place
from saap.models.checkpoint.groupwise import GroupwiseWeight, linears_inside
from saap.models.loading.devices import quick_float32_products
from saap.models.loading.pretrained import end_tokens, load_groupwise, load_model, model_without_weights
from saap.models.loading.references import resolve_model
from saap.models.structure.routers import find_routers, routers_inside
from saap.models.walk.walker import BlockWalker
from saap.pipeline.recover.context import Recovery, prepare
from saap.pipeline.recover.result import RecoverResult, not_quantised, recovery_manifest, recovery_report
from saap.pipeline.recover.teacher import (
    check_fits,
    check_teacher,
    load_teacher,
    missing_sequences,
    products_of,
    store_predictions,
    teacher_logits,
)
from saap.pipeline.shared import stages
from saap.pipeline.shared.inputs import RunOptions
from saap.pipeline.shared.outcome import Behaviour, behaviour, greedy_answer
from saap.pipeline.shared.progress import Reporter, Silent
from saap.pipeline.shared.targets import work_path
from saap.pipeline.shared.verify import check_written, few_logits
from saap.pipeline.shared.work import WorkFolder
from saap.recovery.adapter import AdaptedLinear, adapt, add_lora, merge
from saap.recovery.quantise import check_group_sizes, quantise, quantise_by_feedback
from saap.recovery.sharding import check_shardable, shard_layers
from saap.recovery.teacher_logits import TeacherLogits
from saap.recovery.train import STATE, Report, Trainer
from saap.recovery.weights import TunedWeights, weights_inside
from saap.settings.recover import RecoverConfig, Tuning

FEEDBACK_SAMPLES = 16
# Tolerance of logits for rounding to 16 bits, relative to the largest one.
TOLERANCE = 0.1


def run_recover(
    source: str | Path, config: RecoverConfig, options: RunOptions, reporter: Reporter | None = None
) -> RecoverResult:
    """Tune a model and write it. Invalid inputs are rejected before the training. Raises SaapError."""
    run = prepare(str(source), config, options, reporter or Silent())
    check_teacher(run)
    check_layers(run)
    work = WorkFolder(work_path(options))
    run.processes.broadcast_result(lambda: work.open(run.digest))
    with work.alone(run.processes, stages=STATE), quick_float32_products():
        groupwise = config.tuning is Tuning.GROUPWISE
        dense, before = run.recorded()
        measured = before is not None
        if not measured and groupwise:  # and freed before anything else is loaded
            with run.meter.stage(stages.MEASURE_BEFORE):
                whole = load_model(run.resolved, device=run.device)
                check_fits(run, whole)
                before = _measure(run, whole)
            del whole
        teacher, found = _teacher(run, measured=measured)
        dense = dense if measured else found
        model, handle, parameters = model_to_train(run)
        if before is None:
            with run.meter.stage(stages.MEASURE_BEFORE):
                before = _measure(run, model)
        quantised = None
        if groupwise:
            with run.meter.stage(stages.MEASURE_QUANTISED):
                quantised = _measure(run, model)
        trainer = trainer_of(run, model, teacher, parameters, work.path)
        del teacher
        space = partial(check_place, work.file(STATE), trainer.missing_bytes, "--work-dir")
        run.processes.broadcast_result(space)
        with run.meter.stage(stages.TRAIN):
            training = trainer.run()
        del trainer
        with run.meter.stage(stages.MERGE):
            packed = merge(model) if handle is None else {}
            model = model if handle is None else handle.merge_and_unload()
            after = _measure(run, model)
        behaviours = {"dense": dense, "before": before, "quantised": quantised, "recovered": after}
        known = {name: found for name, found in behaviours.items() if found is not None}
        report = recovery_report(run, model, training, packed, known)
        if options.out is not None and run.processes.first:
            manifest = recovery_manifest(run, model, training, report, known)
            _write(run, model, manifest, packed, options.out)
        run.processes.barrier()
    if run.processes.first:
        work.close(keep=options.keep_work)
    return RecoverResult(model=model, report=report, training=training, path=options.out)


def _measure(run: Recovery, model: nn.Module) -> Behaviour:
    found = perplexities(model, run.evaluation, batch=1, leading=run.leading)
    return behaviour(found, *greedy_answer(model, run.tokenizer))


def _teacher(run: Recovery, *, measured: bool) -> tuple[nn.Module | TeacherLogits | None, Behaviour | None]:
    """What teaches, and the behaviour of the dense model unless that is `measured`. Raises SaapError."""
    logits, distils, dense = teacher_logits(run), bool(run.config.distillation), None
    incomplete = logits is not None and bool(missing_sequences(run, logits))
    needed = not measured or (distils and (logits is None or incomplete))
    teacher: nn.Module | None = load_teacher(run) if needed else None
    if not measured and teacher is not None:
        with run.meter.stage(stages.MEASURE_TEACHER):
            dense = _measure(run, teacher)
    if logits is not None and teacher is not None and incomplete:
        store_predictions(run, teacher, logits)
    return (logits or teacher) if distils else None, dense


def _linears(model: nn.Module) -> dict[str, int]:
    """Path and input size of the linear layers in the decoder blocks. Raises ModelError if there are none."""
    found = linears_inside(model, find_blocks(model))
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no linear layers in its blocks", "Use --tuning full, or another model"
        )
    return found


def model_to_train(run: Recovery) -> tuple[Any, Any | None, dict[str, nn.Parameter]]:
    """The model, the handle of what is trained in full precision if any, and the parameters. Raises SaapError."""
    config = run.config
    if config.tuning is not Tuning.GROUPWISE:
        with run.meter.stage(stages.LOAD):
            model = load_model(run.resolved, device=run.device)
            handle, parameters = _in_full_precision(config, model)
        check_fits(run, model)
        return model, handle, parameters
    with run.meter.stage(stages.QUANTISE, f"{config.bits} bits in groups of {config.group_size}"):
        model = _quantised_model(run)
        check_fits(run, model)
        parameters = adapt(model, rank=config.rank, alpha=config.alpha, seed=config.seed, scales=config.scales)
    left = not_quantised(model)
    if left:
        run.meter.reporter.note(f"{len(left)} matrices of the blocks (routers, or not linear layers) are not tuned")
    return model, None, parameters


def _in_full_precision(config: RecoverConfig, model: nn.Module) -> tuple[Any, dict[str, nn.Parameter]]:
    """A handle whose `merge_and_unload` returns the plain tuned model, and the trained parameters."""
    if config.tuning is not Tuning.LORA:
        found = find_routers if config.tuning is Tuning.ROUTER else weights_inside
        weights = TunedWeights(model, found(model, find_blocks(model)))
        return weights, weights.parameters
    return add_lora(model, _linears(model), rank=config.rank, alpha=config.alpha, seed=config.seed)


def check_layers(run: Recovery) -> None:
    """Raise SaapError if the settings do not fit the layers to quantise. No weights are read."""
    if run.config.tuning is Tuning.GROUPWISE:
        _fitting(run.config, model_without_weights(run.resolved))


def _quantised_model(run: Recovery) -> Any:
    config = run.config
    sizes = {"group_size": config.group_size, "bits": config.bits}
    if not config.error_feedback:
        return load_groupwise(
            run.resolved, partial(_fitting, config), lambda path, read: quantise(read(), **sizes), device=run.device
        )
    model = load_model(run.resolved, device=run.device)
    _fitting(config, model)
    samples = [torch.from_numpy(one.tokens).to(run.device)[None] for one in run.data.train[:FEEDBACK_SAMPLES]]
    quantise_by_feedback(model, find_blocks(model), samples, **sizes, progress=run.meter.reporter.advance)
    return model


def _fitting(config: RecoverConfig, model: nn.Module) -> Sequence[str]:
    """The layers to quantise. Raises SaapError if the settings do not fit them."""
    sizes = _linears(model)
    check_group_sizes(sizes, config.group_size)
    if config.shard:
        check_shardable(model, sizes)
    return tuple(sizes)


def trainer_of(
    run: Recovery, model: nn.Module, teacher: nn.Module | TeacherLogits | None,
    parameters: dict[str, nn.Parameter], folder: Path,
) -> Trainer:  # fmt: skip
    """The trainer of a run, with the teacher if the run distils."""
    reporter = run.meter.reporter
    products = products_of(run)
    live = BlockWalker(teacher, find_blocks(teacher), products=products) if isinstance(teacher, nn.Module) else None
    trainer = Trainer(
        BlockWalker(model, find_blocks(model), products=products), parameters, run.data, run.config, folder=folder,
        processes=run.processes, report=Report(step=reporter.advance, line=reporter.note),
        teacher=teacher if isinstance(teacher, TeacherLogits) else live, ends=end_tokens(model, run.tokenizer),
    )  # fmt: skip
    if run.config.shard:  # not before, as the default learning rate follows from whole weights
        layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, AdaptedLinear)]
        layers += [teacher.get_submodule(path) for path in _linears(teacher)] if isinstance(teacher, nn.Module) else []
        shard_layers(layers, run.device, run.processes)
    return trainer


def _write(run: Recovery, model: Any, manifest: RunManifest, packed: dict[str, GroupwiseWeight], out: Path) -> None:
    """Write the folder, after its reopened model computed what the one in memory does. Raises VerificationError."""
    ids, dtype = torch.from_numpy(next(iter(run.evaluation.values())))[None], run.dtype
    if routers_inside(model, find_blocks(model)):  # rounding in between would send some tokens to other experts
        dtype = torch.float32
        for parameter in model.parameters():
            parameter.data = parameter.data.to(run.dtype).to(parameter.dtype)

    def check(folder: Path) -> None:
        # on the CPU, as the device may have no room for a second model
        written = resolve_model(folder, trust_remote_code=run.resolved.trust_remote_code)
        reopened = load_model(written, device=torch.device("cpu"), dtype=dtype)
        check_written(str(out), reopened, ids, expected, TOLERANCE * expected.abs().max())

    with run.meter.stage(stages.WRITE):
        parts = FolderParts(
            manifest=manifest, tokenizer=run.tokenizer,
            source_folder=run.resolved.folder if run.resolved.gguf_file is None else None,
        )  # fmt: skip
        expected = few_logits(model, ids.to(next(model.parameters()).device)).cpu()
        write_recovered(model, parts, packed, out, dtype=run.dtype, overwrite=run.options.overwrite, check=check)
