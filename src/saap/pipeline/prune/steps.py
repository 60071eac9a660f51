"""How each stage of a run is carried out, and the loop over the declared list of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from saap.core.storage import write_plan
from saap.pipeline.prune import finish, making, planning
from saap.pipeline.shared import stages
from saap.pipeline.shared.context import Run
from saap.pipeline.shared.outcome import Behaviour
from saap.pipeline.shared.stages import Stage, Step, outstanding, steps_of
from saap.pipeline.shared.targets import Target, finished_report
from saap.pipeline.shared.tokens import finds_costs, needs_measuring
from saap.settings.prune import PrunableRole


class Action(NamedTuple):
    """How a stage's result is made, and how one that is a file gets into it and out of it again.

    make: a function of the run, the target where the stage has one, and what the stage needs beyond the run. read: of
    the run and the path of a file, or, for a result that is a folder, the target.
    """

    make: Callable[..., Any]
    read: Callable[[Run, Any], Any] | None = None
    write: Callable[[Run, Path, Any], None] | None = None


ACTIONS: Mapping[Stage, Action] = {
    stages.MEASURE_DENSE: Action(
        planning.measure_dense,
        lambda run, path: Behaviour.model_validate(run.work.read_json(path.name)),
        lambda run, path, found: run.work.write_json(path.name, found.model_dump()),
    ),
    stages.ESTIMATE: Action(planning.estimate_scores, planning.read_run_scores, planning.write_run_scores),
    stages.FIND_COSTS: Action(planning.find_costs),
    stages.KEEP_SCORES: Action(lambda run, costs: costs.scores, planning.read_run_scores, planning.write_run_scores),
    stages.EVALUATE_DENSE: Action(planning.evaluate_dense),
    stages.SEARCH: Action(
        planning.search_plan, planning.read_whole_plan, lambda run, path, plan: write_plan(path, plan, run.graph)
    ),
    stages.CUT: Action(making.make_model, making.read_made),
    stages.RESTORE: Action(making.make_model, making.read_made),
    stages.MEASURE: Action(finish.measure_result),
    stages.TIME_RESULT: Action(finish.time_result),
    stages.PLACE: Action(finish.place_result, finish.read_result),
}

_OF_THE_RUN = {stage.gives for stage in stages.PREPARE}


def requested_stages(run: Run) -> list[Stage]:
    """Those stages, in order, that the settings of a run require."""
    config, searches = run.config, any(target.budget is not None for target in run.targets)
    evaluates = planning.search_evaluations(run) > 0
    costs = searches and finds_costs(config, run.loaded.model, run.graph)
    optional = {
        stages.ESTIMATE: not costs and planning.scores_decide(run),
        stages.FIND_COSTS: costs,
        stages.KEEP_SCORES: costs,
        stages.EVALUATE_DENSE: searches
        and needs_measuring(config)
        and (evaluates or PrunableRole.BLOCK in config.roles),
        stages.CUT: not config.restore,
        stages.RESTORE: config.restore,
        stages.TIME_RESULT: config.target_speedup is not None,
    }
    return [stage for stage in stages.PRUNE if optional.get(stage, True)]


def carry_out(run: Run, wanted: Sequence[str], given: Mapping[str, Any] | None = None) -> Mapping[tuple[str, str], Any]:
    """Carry out what has to be done for the results `wanted`, or read it where an interrupted run has done it.

    given: results that are known. Returns each wanted result by its name and that of its target.
    """
    targets = {target.name: target for target in run.targets}
    values: dict[tuple[str, str], Any] = {(name, ""): value for name, value in (given or {}).items()}
    known = {*_OF_THE_RUN, *(given or {})}
    steps = steps_of([stage for stage in requested_stages(run) if stage.gives not in known], list(targets))
    done = run.processes.broadcast_result(lambda: [step for step in steps if _is_done(run, step, targets)])
    left = outstanding(steps, done, wanted)
    for number, step in enumerate(left, start=1):
        action, path = ACTIONS[step.stage], run.work.file(step.stage.file_of(step.target))
        with run.meter.stage(step.title):
            if step in done and action.read is not None:
                values[step.gives] = action.read(run, targets[step.target] if action.write is None else path)
            else:
                values[step.gives] = _make(run, step, targets, values)
        needed = {need for later in left[number:] for need in later.needs}
        values = {key: value for key, value in values.items() if key in needed or key[0] in wanted}
    return values


def _make(run: Run, step: Step, targets: Mapping[str, Target], values: Mapping[tuple[str, str], Any]) -> Any:
    action = ACTIONS[step.stage]
    about = [targets[step.target]] if step.stage.per_target else []
    needs = [name for name in step.stage.needs if name not in _OF_THE_RUN]
    found = (values.get((name, step.target), values.get((name, ""))) for name in needs)
    # Until there is a plan, the stages read samples with the dense model; later ones have a model of their own.
    images = nullcontext() if {"plan", "pruned model"} & set(needs) else run.tokens.images(run.loaded.model)
    with images:
        made = action.make(run, *about, *found)
    write, path = action.write, run.work.file(step.stage.file_of(step.target))
    if write is not None:
        run.processes.broadcast_result(lambda: write(run, path, made))
    return made


def _is_done(run: Run, step: Step, targets: Mapping[str, Target]) -> bool:
    if step.stage is stages.PLACE:
        return finished_report(run.work, targets[step.target]) is not None
    if step.stage in (stages.CUT, stages.RESTORE):
        return making.is_made(run, targets[step.target])
    return ACTIONS[step.stage].write is not None and run.work.file(step.stage.file_of(step.target)).exists()
