"""From a made model to a result: open and measure what was written, complete its records, say what looks wrong."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from saap.core.errors import VerificationError
from saap.core.manifest import Answers, KindChange, PerplexityChange, SpeedRecord
from saap.core.records import ImportanceScores
from saap.data.texts import UNKNOWN
from saap.evaluation.perplexity import bits_per_byte
from saap.export.huggingface import write_records
from saap.export.model_card import load_lines
from saap.models.loading import memory
from saap.models.loading.references import read_config
from saap.models.walk.offload import offloaded, placeholder
from saap.pipeline.prune.making import Made, changed_folder, made_path, manifest_of_run, open_result, release
from saap.pipeline.prune.planning import read_whole_plan
from saap.pipeline.prune.result import PruneReport, PruneResult, structure_of
from saap.pipeline.prune.source_file import write_manifest
from saap.pipeline.prune.speed_target import reached_speed
from saap.pipeline.shared.context import Run
from saap.pipeline.shared.outcome import Behaviour, observe
from saap.pipeline.shared.targets import Target, finished_report, is_file, place_finished, records_of
from saap.pipeline.shared.tokens import HELD_OUT
from saap.pipeline.shared.verify import check_written, few_logits
from saap.settings.registry import Method
from saap.structure_search.budget import TimeBudget

TOLERANCE = 1e-3
"""Of logits, absolute and relative."""
LARGEST_LOSS = 1.75
"""Of a kind of text in nats, over the median of all kinds."""
LARGEST_GROWTH_BY_TOKENS = 1.05
"""Of the perplexity, if nothing but tokens was removed."""
LARGEST_DEVIATION = 0.1
"""Of the reached speed-up from the requested one."""


def measure_result(run: Run, target: Target, made: Made) -> Behaviour | None:
    """What the result does, opened from its folder; of several processes the first alone opens what it has written."""
    if target.path is not None:
        model, made.model = made.model, None
        if not run.processes.first:
            return None
        ids = run.tokens.tensor("held", run.device)[:1]
        expected = None if model is None else few_logits(model, ids)
        if model is not None:
            release(model)
        if model is run.loaded.model and run.loaded.fresh is None:
            for parameter in model.parameters():  # the run holds it to its end: free its memory, not its shapes
                parameter.data = placeholder(parameter.shape, parameter.dtype, parameter.device)
        del model
        memory.give_back()
        shutil.rmtree(changed_folder(run, target), ignore_errors=True)
        made.model = open_result(run, made_path(run, target))
        limit = 0.0 if expected is None else TOLERANCE * (1 + expected.abs())
        check_written(target.name, made.model, ids, expected, limit)
    return observe(_model_of(made), run.loaded.tokenizer, run.tokens, run.spill)


def time_result(run: Run, target: Target, made: Made, pruned: Behaviour | None) -> SpeedRecord | None:
    """The speed of the result, where it was measured and one was requested."""
    if pruned is None or not isinstance(target.budget, TimeBudget):
        return None
    return reached_speed(run, target.budget, made.plan, _model_of(made))


def place_result(
    run: Run, target: Target, scores: ImportanceScores | None, dense: Behaviour, made: Made, pruned: Behaviour | None,
    speed: SpeedRecord | None,
) -> PruneResult:  # fmt: skip
    """The result with its records, in its place; the other processes open what the first has put there."""
    if pruned is None:
        run.processes.barrier()
        if finished_report(run.work, target) is None:
            raise VerificationError(
                f"{target.path} has not been seen by process {run.processes.rank}",
                "Let all processes work on one file system",
            )
        return read_result(run, target)
    plan, tokens, model, path = made.plan, run.tokens, _model_of(made), target.path
    text, size = tokens.measured
    perplexity = PerplexityChange(text=text, tokens=size, before=dense.perplexity, after=pruned.perplexity)
    kinds = _by_kind(run, dense, pruned)
    answers = Answers(prompt=dense.prompt, dense=dense.answer, pruned=pruned.answer)
    measured = {"perplexity": perplexity, "kinds": kinds, "answers": answers, "speed": speed}
    manifest = manifest_of_run(run, plan, scores).model_copy(update=measured)
    known = [one for one in kinds if run.vocabulary is None or one.text in run.vocabulary.kinds]
    findings = findings_of(run, made, scores, perplexity, speed) + uneven_losses(known)
    report = PruneReport(
        model=manifest.base.source, path=None if path is None else str(path), target=target.name,
        layout=str(plan.layout), strategy=plan.strategy, seed=manifest.seed,
        pruning_ratio=manifest.block_parameters.removed,
        parameters_dense=manifest.parameters.before, parameters=manifest.parameters.after,
        block_parameters_dense=manifest.block_parameters.before, block_parameters=manifest.block_parameters.after,
        bytes_dense=manifest.bytes.before, bytes=manifest.bytes.after, dtype=manifest.dtype,
        evaluation_text=perplexity.text, evaluation_tokens=perplexity.tokens,
        perplexity_dense=perplexity.before, perplexity=perplexity.after,
        kinds=kinds, prompt=answers.prompt, answer_dense=answers.dense, answer=answers.pruned,
        speed=None if speed is None else speed.model_dump(), structure=structure_of(run.graph, plan), trail=plan.trail,
        refit_errors=dict(made.restored.refit_errors), distillation=made.restored.distillation,
        findings=tuple(findings), stages=manifest.stages, vocabulary=manifest.vocabulary,
        load_lines=() if path is None else _load_lines(path, made_path(run, target)),
    )  # fmt: skip
    if path is not None:
        written = made_path(run, target)
        write_manifest(written, manifest) if is_file(written) else write_records(written, manifest)
        place_finished(run.work, target, written, report.as_dict())
        run.processes.barrier()
    # Weights in files have another place now, and the models of earlier targets must not fill the memory.
    again = path is not None and (offloaded(model) is not None or target is not run.targets[-1])
    opener = partial(open_result, run, path) if path is not None and again else lambda: model
    return PruneResult(plan=plan, report=report, path=path, opener=opener)


def _load_lines(path: Path, written: Path) -> tuple[str, ...]:
    """The lines that open the result at `path`, where it is to be put. written: where it is now."""
    if is_file(path):
        return ("import saap", f'model = saap.load("{path}")', f"# or in a terminal: llama-cli -m {path}")
    return load_lines(path, read_config(written), written)


def _by_kind(run: Run, dense: Behaviour, pruned: Behaviour) -> tuple[KindChange, ...]:
    """The perplexities of both models on each kind of text, those left out that are no numbers."""
    found = []
    for kind, ids in run.tokens.evaluation.items():
        before, after = dense.kinds[kind], pruned.kinds[kind]
        if kind == HELD_OUT or math.isnan(before) or math.isnan(after):
            continue
        size = run.tokens.size(kind)
        bits = bits_per_byte(before, ids, run.loaded.tokenizer) * size / ids.size
        finite = bits if math.isfinite(bits) else None
        found.append(KindChange(text=kind, tokens=size, before=before, after=after, bits_per_byte=finite))
    return tuple(found)


def read_result(run: Run, target: Target) -> PruneResult:
    """The target's result, which has been put in its place."""
    report = PruneReport.model_validate(finished_report(run.work, target))
    path = Path(str(target.path))
    plan = read_whole_plan(run, records_of(path) / "plan.json")
    return PruneResult(plan=plan, report=report, path=path, opener=partial(open_result, run, path))


def _model_of(made: Made) -> nn.Module:
    if made.model is None:
        raise VerificationError("The pruned model is neither in memory nor in the work folder", "Run again")
    return made.model


def findings_of(
    run: Run, made: Made, scores: ImportanceScores | None, perplexity: PerplexityChange, speed: SpeedRecord | None
) -> list[str]:
    """Signs that scores, search, reconstruction, speed or memory were not as they should be."""
    findings, trail = [] if scores is None else _of_scores(scores), made.plan.trail
    if trail and trail[0].loss > 2.0:
        findings.append(
            f"the chosen structure is {trail[0].loss:.1f} nats per token away from the dense model "
            "before reconstruction: prune less, or allow more roles and layers."
        )
    removed = 1 - made.plan.block_parameters / run.graph.block_parameters
    if run.vocabulary is not None:
        removed = max(removed, 1 - made.plan.parameters / run.dense_parameters)
    growth, of_a_file = perplexity.ratio, run.options.out is not None and is_file(run.options.out)
    if not math.isfinite(growth):
        findings.append(
            "the pruned model's perplexity is not finite: prune less"
            + ("." if of_a_file else ", or compute in float32 (--dtype float32).")
        )
    elif run.config.vocabulary_only:
        if growth > LARGEST_GROWTH_BY_TOKENS:
            findings.append(
                f"perplexity grew {growth:.2f} times with fewer tokens: keep more of them (--vocabulary-size), or more "
                "languages (--languages), if the model is for that text."
            )
    elif growth > 1 + 10 * removed:
        remedies = {  # only what this run would take
            "use --preset best or more refit text (--refit-tokens)": run.config.restore,
            "use --restore": not run.config.restore and not of_a_file,
            "use another --strategy": run.config.method is Method.SAAP and run.config.plan is None,
        }
        more = ", or ".join(remedy for remedy, possible in remedies.items() if possible) or "prune less"
        findings.append(
            f"perplexity grew {growth:.1f} times for {removed:.0%} removed, more than usual: the importance scores may "
            f"not fit this model; {more}."
        )
    useless, every = sum(error >= 1.0 for error in made.restored.refit_errors.values()), len(made.restored.refit_errors)
    if useless > every / 2:
        findings.append(
            f"reconstruction helped in only {every - useless} of {every} modules: "
            "the refit text is too short or too uniform (--refit-tokens, --calibration)."
        )
    if speed is not None and abs(speed.reached / speed.asked - 1) > LARGEST_DEVIATION:
        findings.append(
            f"the speed-up reached is {speed.reached:.2f}, not {speed.asked:g}: other work on this machine disturbs "
            "such measurements; run again when it is quiet, without the table in the cache folder"
        )
    most = 12 * run.graph.parameters * run.loaded.dtype.itemsize + 4 * 10**9
    flags = "--refit-tokens or --num-samples" if run.config.restore else "--num-samples"
    return findings + [
        f"stage {stage.name!r} used {stage.peak_resident_bytes / 1e9:.1f} GB, over 12 times the weights: lower {flags}."
        for stage in run.meter.stages
        if stage.peak_resident_bytes > most
    ]


def uneven_losses(kinds: Sequence[KindChange]) -> list[str]:
    """A sentence on each kind of text that lost far more than the others, and how to keep it.

    Of the kinds that the dense model knows: what it cannot read has nothing to lose.
    """
    growth = {
        one.text: math.log(one.ratio) for one in kinds if one.bits_per_byte is not None and one.bits_per_byte < UNKNOWN
    }
    usual = float(np.median(list(growth.values()))) if growth else 0.0
    return [
        f"the perplexity of {kind} grew {math.exp(lost):.1f} times, that of most kinds of text {math.exp(usual):.1f} "
        f"times: if the model is for it, calibrate on more of it with --calibration mixed --calibration {kind}."
        for kind, lost in growth.items()
        if lost > max(LARGEST_LOSS * usual, math.log(1.3))
    ]


def _of_scores(scores: ImportanceScores) -> list[str]:
    """Units without any signal, or an order that few samples would change."""
    findings, samples = [], scores.samples
    elements = [group.element for group in scores.groups.values()]
    silent = np.concatenate([element == 0 for element in elements]).mean() if elements else 0.0
    if silent > 0.05:
        findings.append(
            f"{silent:.0%} of the units have importance 0: the calibration text never uses them; "
            "calibrate on more or more varied text (--calibration, --num-samples)."
        )
    errors = [0.0]  # median standard errors of a unit's mean, over the spread of the means inside the module
    for group in scores.groups.values():
        error = float(np.median(np.sqrt(np.maximum(group.element_m2, 0) / max(samples - 1, 1) / samples)))
        spread = float(group.element.std())
        errors.append(error / spread if spread > 0 else 0.0)
    if float(np.median(errors[1:] or errors)) > 0.5:
        findings.append(
            "the importance scores are noisy: their error over samples exceeds half of their spread over units; "
            f"use more samples than {samples} (--num-samples)."
        )
    return findings
