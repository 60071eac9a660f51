"""The estimation: score every unit in one pass over the calibration samples, and derive the score of the search."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from saap.core.errors import CalibrationError, ConfigurationError, UnsupportedModelError
from saap.core.records import CalibrationSet, CoupledGroup, ImportanceScores, ModelGraph, Role, UnitScores, digest_of
from saap.data.samples import GIVEN_IDS
from saap.estimation.importance import ELEMENT_SCORES, Scoring
from saap.estimation.routing import module_of
from saap.estimation.statistics import ScoreObserver
from saap.estimation.unit_importance import UnitImportance
from saap.models.structure.routing import in_pieces
from saap.models.walk.backend import Backend
from saap.models.walk.observer import Observer
from saap.models.walk.walk import walk
from saap.settings.prune import Aggregation, ElementOrder, FusionScope
from saap.settings.registry import Importance

TOKENS_AT_ONCE = 256
"""Tokens of a micro-batch. More tokens are no faster on a CPU, and each takes the memory of all block inputs."""


def estimate(
    backend: Backend,
    calibration: CalibrationSet,
    *,
    roles: Collection[Role] = (Role.FFN, Role.ATTENTION),
    importance: Importance = Importance.FUSED,
    element_order: ElementOrder = ElementOrder.SECOND,
    aggregation: Aggregation = Aggregation.SUM,
    micro_batch: int | None = None,
    also: Sequence[Observer] = (),
) -> ImportanceScores:
    """Mean and variance over samples of the vector-wise and element-wise importance of every unit of `roles`.

    One pass gives both. The importance of each sample is that of its own loss, the mean over its predicted tokens;
    samples are then averaged. Members in linear modules of the decoder blocks are scored, biases with their channels.
    importance: if it has its own observer, that replaces the two scores. micro_batch: samples at a time, by default as
    many as fit into 256 tokens; it does not change the result. Groups in stacked tensors (experts) require one. also:
    further observers of the same walk.
    Raises CalibrationError for fewer than two samples, NonFiniteLossError, UnsupportedModelError.
    """
    samples, length = calibration.tokens.shape
    if samples < 2:
        raise CalibrationError(
            "Fluctuation over samples needs two of them",
            "Give at least two rows" if calibration.sources == (GIVEN_IDS,) else "Use --num-samples 2 or more",
        )
    graph = backend.graph
    scoring: Scoring = importance.load()
    groups = [group for group in graph.groups if group.role in roles]
    element = scoring.element or ELEMENT_SCORES[element_order]
    usual = partial(UnitImportance, element=element, aggregation=aggregation)
    observer: ScoreObserver = (scoring.observer or usual)(backend, groups)
    rows = 1 if observer.one_by_one else micro_batch or max(1, TOKENS_AT_ONCE // length)
    tokens = torch.from_numpy(calibration.tokens).to(backend.device)
    passes: dict[bool, list[Observer]] = {observer.backward: [observer]}  # with and without a backward pass
    if also:
        passes.setdefault(True, []).extend(also)
    dtypes = backend.products, next(backend.model.parameters()).dtype
    decides = importance, element_order, aggregation, sorted(roles), rows, backend.device, *dtypes
    inside = not also and all(group.layer >= 0 for group in groups)  # scores are complete with their block
    digest = digest_of([graph.digest, calibration.digest, *map(str, decides)]) if inside else ""
    with in_pieces(_experts(backend.model, graph, groups)):
        for backward, observers in passes.items():
            walk(
                backend, tokens, observers, micro_batch=rows, backward=backward, ignored=calibration.ignored,
                digest=digest,
            )  # fmt: skip
    losses, found = observer.result()
    unscored = next((group.name for group in groups if group.name not in found), None)
    if unscored is not None:
        raise UnsupportedModelError(
            f"The importance {importance} does not score {unscored}", "Leave out its role with --roles"
        )
    own = scoring.element or scoring.observer
    return ImportanceScores(
        graph_digest=graph.digest, calibration_digest=calibration.digest, samples=samples,
        element_order=str(importance if own else element_order), aggregation=str(aggregation),
        losses=losses, groups=found,
    )  # fmt: skip


def _experts(model: nn.Module, graph: ModelGraph, groups: Iterable[CoupledGroup]) -> list[nn.Module]:
    """The modules of the experts that are whole units."""
    members = [member for group in groups if group.role is Role.EXPERT for member in group.members]
    paths = {module_of(one.tensor) for one in members if len(graph.shapes[one.tensor]) > 2}
    return [model.get_submodule(path) for path in sorted(paths)]


def unit_scores(
    scores: ImportanceScores, graph: ModelGraph, importance: Importance, scope: FusionScope
) -> Mapping[str, UnitScores]:
    """Mean and variance over samples of the chosen importance, by group. scope: of the fusion."""
    scoring: Scoring = importance.load()
    return scoring.units(scores, graph, scope)


def unused_experts(scores: ImportanceScores, graph: ModelGraph) -> dict[str, list[int]]:
    """Experts that no calibration token was routed to, by group: their scores are zero, so they are removed first."""
    names = [group.name for group in graph.of_role(Role.EXPERT) if group.name in scores.groups]
    unused = {name: np.flatnonzero(scores.groups[name].element == 0).tolist() for name in names}
    return {name: units for name, units in unused.items() if units}


def require_measured(scores: ImportanceScores, importance: Importance) -> None:
    """Raise ConfigurationError for scores of another importance."""
    scoring: Scoring = importance.load()
    own = scoring.element or scoring.observer
    if scores.element_order not in ([str(importance)] if own else [str(order) for order in ElementOrder]):
        raise ConfigurationError(
            f"The scores were estimated with the importance {scores.element_order}, not {importance}",
            "Use the importance that they were estimated with",
        )
