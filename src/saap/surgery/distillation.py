"""Norm tuning: what the least-squares reconstruction leaves is made up for by the scales between the matrices.

The one-dimensional parameters of the blocks (scales of norms, biases) are trained so that the predictions of the pruned
model follow those of the dense one. There are so few that no optimizer state counts, and every format stores them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saap.core.errors import NonFiniteLossError
from saap.models.loading.precision import at_least_float32, widest_dtype
from saap.models.walk.backend import Backend
from saap.models.walk.loss import learned_losses
from saap.models.walk.offload import onload
from saap.models.walk.spill import Tensors
from saap.models.walk.walker import BlockWalker, Contexts, inference_only

LEARNING_RATE = 1e-2
"""Of Adam at its height, times the root mean square of each vector."""
LEAST_SCALE = 0.1
"""A vector of smaller entries is trained as if they had this size: a bias may begin at zero."""
WARM_UP_STEPS = 3
STEPS = 32
"""At most; of more text each step takes more."""
BETAS = (0.9, 0.95)
ROUNDING = 1e-6
"""A divergence below this, in nats per token, is that of rounding."""
LARGEST_NORM = 1.0
"""Of the gradient of all vectors together, each in units of its own scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningText:
    """What is tuned on.

    tokens: (sequences, length) ids. trained: how many of the first to train on. held_out: how many of the last judge.
    teacher: hidden states after the dense model's last block, in micro-batches of `micro_batch` sequences, of those
    that are this process' share. ignored: ids whose prediction does not count (places of an image).
    """

    tokens: Tensor
    teacher: Tensors
    trained: int
    held_out: int
    micro_batch: int
    ignored: Sequence[int] = ()


@torch.no_grad()
def tune_norms(backend: Backend, blocks: Sequence[str], text: TuningText) -> tuple[float, float]:
    """Train the vectors of the blocks by the KL divergence of the dense model's predictions from the pruned one's.

    backend: of the pruned model, whose `blocks` are the paths of those that are left. One pass over the text to train
    on; where that does not lower the divergence on what is held out, the vectors stay as they were. The final norm
    stays, so that one head reads both streams. Of several processes each computes for the sequences whose dense hidden
    states it has, and all take the same steps. Returns the divergence on the latter before and after, in nats per
    token; zeros where there is nothing to tune or to make up for. Raises NonFiniteLossError.
    """
    tuning = _Tuning(backend, blocks, text)
    if not tuning.parameters:
        return 0.0, 0.0
    with inference_only(backend.model):
        return tuning.run()


class _Tuning:
    """One training. values: by name, the vectors in float32, which lead where the model's are coarser or in files."""

    def __init__(self, backend: Backend, blocks: Sequence[str], text: TuningText) -> None:
        self.model, self.processes, self.progress = backend.model, backend.processes, backend.progress
        self.text, self.walker = text, BlockWalker(backend.model, blocks, products=backend.products)
        self.parameters: dict[str, list[str]] = {}
        self.values: dict[str, Tensor] = {}
        for path, block in zip(self.walker.paths, self.walker.blocks, strict=True):
            onload(self.model, path)
            names = [f"{path}.{name}" for name, one in block.named_parameters() if one.dim() == 1 and len(one)]
            names = [name for name in names if self.model.get_parameter(name).is_floating_point()]
            self.parameters |= {path: names} if names else {}
            for name in names:  # together on one device, so that sums over them do not depend on the placement
                value = at_least_float32(self.model.get_parameter(name).detach())
                self.values[name] = value.to(text.tokens.device, copy=True)
        self.scales = {name: _scale(value) for name, value in self.values.items()}

    def run(self) -> tuple[float, float]:
        """Train, and keep what was better."""
        rows, each = self.text.trained, -(-self.text.trained // STEPS)
        steps = [range(first, min(first + each, rows)) for first in range(0, rows, each)]
        start = dict(self.values)
        before = self._divergence()
        if before < ROUNDING:
            return 0.0, 0.0
        changes = {name: value.new_zeros(value.shape).requires_grad_() for name, value in self.values.items()}
        optimizer = torch.optim.Adam(changes.values(), lr=0.0, betas=BETAS)
        for done, step in enumerate(steps):
            gradients = self._gradients(step)
            for name, change in changes.items():
                change.grad = gradients[name].to(change) * self.scales[name]
            torch.nn.utils.clip_grad_norm_(changes.values(), LARGEST_NORM)
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(done, len(steps))
            optimizer.step()
            self.values = {name: start[name] + self.scales[name] * change for name, change in changes.items()}
            self.progress(done + 1, len(steps))
        after = self._divergence()
        if not after < before:
            self.values, after = start, before
        for path, names in self.parameters.items():
            onload(self.model, path, change=True)
            self._put(names)
        return before, after

    def _put(self, names: Sequence[str]) -> None:
        for name in names:
            self.model.get_parameter(name).copy_(self.values[name])

    def _prepare_block(self, layer: int) -> str:
        """Have the vectors of a block, whose weights may be in files, at their values. Returns its path."""
        path = self.walker.paths[layer]
        onload(self.model, path)
        self._put(self.parameters.get(path, ()))
        return path

    def _own(self, rows: range) -> list[tuple[Tensor, Tensor]]:
        """Ids and dense hidden states of those of the rows that are this process' share, (1, length) each."""
        text = self.text
        own = self.processes.share(-(-len(text.tokens) // text.micro_batch))
        found = []
        for row in rows:
            batch, place = divmod(row, text.micro_batch)
            if batch in own:
                hidden = text.teacher[batch - own.start][place : place + 1]
                found.append((text.tokens[row : row + 1], hidden))
        return found

    def _forward(self, tokens: Tensor) -> tuple[list[Tensor], Tensor, Contexts]:
        """The input of each block, the output of the last one, and the blocks' contexts."""
        stream = self.walker.start(tokens)
        hidden, inputs = stream.hidden, []
        for layer in range(len(self.walker.blocks)):
            inputs.append(hidden)
            self._prepare_block(layer)
            hidden = self.walker.run_block(layer, hidden, stream.contexts)
        return inputs, hidden, stream.contexts

    def _losses(self, hidden: Tensor, tokens: Tensor, teacher: Tensor, predictions: int) -> tuple[float, Tensor]:
        """Summed divergence of some sequences, and the gradient of its mean over `predictions` at the last block.

        Where the stream itself was pruned, the head does not read the dense one: then it is the loss of the text.
        """
        tokens = tokens.to(hidden.device)
        learned = self._learned(tokens)
        dense = (self.walker, teacher.to(hidden.device)) if teacher.shape == hidden.shape else None
        losses, gradient = learned_losses(
            self.walker, hidden, tokens, learned, predictions=predictions, teacher=dense, weight=1.0
        )
        return float(losses.sum()), gradient

    def _learned(self, tokens: Tensor) -> Tensor:
        ignored = torch.tensor(list(self.text.ignored), dtype=tokens.dtype, device=tokens.device)
        return ~torch.isin(tokens, ignored)

    def _gradients(self, rows: range) -> Mapping[str, Tensor]:
        """Gradients of the vectors by the mean divergence over the tokens of some sequences, of all processes."""
        predictions = int(self._learned(self.text.tokens[rows.start : rows.stop])[:, 1:].sum())
        found = {name: torch.zeros_like(value) for name, value in self.values.items()}
        for tokens, teacher in self._own(rows):
            inputs, hidden, contexts = self._forward(tokens)
            with torch.enable_grad():
                _, gradient = self._losses(hidden, tokens, teacher, max(1, predictions))
            for layer in reversed(range(len(inputs))):
                names = self.parameters.get(self._prepare_block(layer), ())
                weights = {name: self.model.get_parameter(name) for name in names}
                gradient, of_weights = self.walker.backward_to_weights(layer, inputs.pop(), contexts, gradient, weights)
                for name, one in of_weights.items():
                    found[name] += one.to(found[name])
        self.processes.add_up(list(found.values()))
        return found

    def _divergence(self) -> float:
        """Mean divergence over the tokens that are held out, of all processes."""
        text, total, count = self.text, 0.0, 0.0
        for tokens, teacher in self._own(range(len(text.tokens) - text.held_out, len(text.tokens))):
            total += self._losses(self._forward(tokens)[1], tokens, teacher, 1)[0]
            count += int(self._learned(tokens)[:, 1:].sum())
        both = torch.tensor([total, count], dtype=widest_dtype(text.tokens.device), device=text.tokens.device)
        total, count = (float(one) for one in self.processes.total(both))
        if not math.isfinite(total):
            raise NonFiniteLossError("The pruned model's predictions are not finite", "Use --dtype float32")
        return total / max(1, count)


def _scale(value: Tensor) -> Tensor:
    return value.square().mean().sqrt().clamp_min(LEAST_SCALE)


def _learning_rate(done: int, steps: int) -> float:
    """Of step `done`: a linear warm-up, then half a cosine towards 0."""
    return LEARNING_RATE * min(1.0, (done + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * done / steps))
