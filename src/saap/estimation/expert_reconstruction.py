"""Expert reconstruction: what a layer loses without an expert, after the best remix of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from saap.core.records import CoupledGroup, FloatArray, GroupScores
from saap.estimation.importance import Scoring
from saap.estimation.reap import outputs_by_choice
from saap.estimation.routing import RouterFrequency, chosen
from saap.models.structure.routing import pieces
from saap.models.walk.backend import Backend
from saap.models.walk.observer import Observation
from saap.models.walk.processes import Processes

DAMPING = 1e-3
"""Share of the mean diagonal that is added to the Gram matrix."""


class ExpertReconstruction(RouterFrequency):
    """Squared error of a layer's output without an expert when the others' outputs are scaled as well as possible.

    With the Gram matrix G of the experts' gated outputs over all tokens, that is 1 / (G^-1)_ee: zero for an expert that
    others can stand in for. Tokens weigh the same: each is divided by the norm of the layer's output for it.
    """

    def __init__(self, backend: Backend, groups: Sequence[CoupledGroup]) -> None:
        super().__init__(backend, groups)
        self._grams = {
            site: torch.zeros(count + 1, count + 1, dtype=torch.float64) for site, count in self._experts.items()
        }

    def observe(self, seen: Observation) -> None:
        """Add the products of the outputs of the experts that share a token."""
        for arguments in pieces(seen.arguments):
            numbers = chosen(seen.site, arguments).clamp(max=self._experts[seen.site]).cpu()
            outputs = torch.stack(list(outputs_by_choice(self._model, seen.site, arguments)), 1)  # (tokens, K, width)
            outputs /= outputs.sum(1, keepdim=True).norm(dim=-1, keepdim=True).clamp_min(1e-12)
            products = torch.einsum("tpw,tqw->tpq", outputs, outputs).cpu().double()
            rows, columns = numbers.unsqueeze(2).expand_as(products), numbers.unsqueeze(1).expand_as(products)
            self._grams[seen.site].index_put_((rows, columns), products, accumulate=True)

    def state(self) -> Mapping[str, FloatArray]:
        """The Gram matrices too."""
        return {**super().state(), **{f"gram/{site}": gram.numpy() for site, gram in self._grams.items()}}

    def restore(self, state: Mapping[str, FloatArray]) -> None:
        """Continue from the Gram matrices too."""
        super().restore(state)
        self._grams = {site: torch.from_numpy(state[f"gram/{site}"].copy()) for site in self._grams}

    def merge(self, processes: Processes) -> None:
        """Sum the Gram matrices of all processes."""
        super().merge(processes)
        found: Sequence[dict[str, Tensor]] = processes.gather(self._grams)
        self._grams = {site: torch.stack([one[site] for one in found]).sum(0) for site in self._grams}

    def result(self) -> tuple[FloatArray, dict[str, GroupScores]]:
        """Losses, of which there are none, and the scores of all groups; they have no variance over samples."""
        losses, _ = super().result()
        found = {}
        for site, groups in self._groups.items():
            gram = self._grams[site][:-1, :-1]
            damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
            lost = (gram.diagonal().sign() / torch.linalg.inv(damped).diagonal()).numpy()  # 0 for one without tokens
            for name, own in groups.items():
                none = np.zeros(len(own))
                found[name] = GroupScores(
                    vector=lost[own], vector_m2=none, element=lost[own], element_m2=none, comoment=none
                )
        return losses, found


RECONSTRUCTION = Scoring(observer=ExpertReconstruction)
