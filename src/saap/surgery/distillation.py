"""Short distillation after the least-squares reconstruction: the pruned model learns the dense model's predictions.

Trained are the one-dimensional parameters of the blocks (norm scales, biases) and a low-rank update of each matrix
(LoRA, Hu et al. 2021), which is merged in the end. So the optimizer state is small, and every format stores the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saap.core.errors import NonFiniteLossError
from saap.models.loading.precision import at_least_float32, widest_dtype
from saap.models.structure.linear import linear_modules, only_multiplies, weight_out_in
from saap.models.walk.activations import kept_bytes, most_kept
from saap.models.walk.backend import Backend
from saap.models.walk.loss import learned_losses
from saap.models.walk.observer import hooked
from saap.models.walk.offload import offloaded, onload
from saap.models.walk.spill import Tensors
from saap.models.walk.walker import BlockWalker, Contexts, Stream, gradients, inference_only

LEARNING_RATE = 4e-3
"""Of Adam at its height, times the scale of each parameter."""
VECTOR_SHARE = 0.15
"""Of a vector's size that is its scale: every token reads it, so a random step costs far more than one of a matrix."""
LEAST_SCALE = 0.1
"""A vector of smaller entries is trained as if they had this size: a bias may begin at zero."""
RANK = 16
"""Of the updates of the matrices."""
DOWN_SCALE, UP_SCALE = 7.0, 0.2
"""Of the factors of an update: A in units of its entries at the start, B so that B A is in units of the matrix."""
WARM_UP_STEPS = 3
SEQUENCES = 4
"""Of a step, at least: the gradient of a single one is mostly noise, of which Adam makes steps of full size."""
STEPS = 256
"""At most; of more text each step takes more sequences, which the processes share."""
TOKENS_AT_ONCE = 512
"""Of a forward, if its sequences are shorter: fewer would not fill the processor, more would take memory."""
BETAS = (0.9, 0.95)
ROUNDING = 1e-5
"""A divergence below this, in nats per token, is that of rounding."""
LARGEST_NORM = 1.0
"""Of the gradient of all parameters together, each in units of its own scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationText:
    """What is distilled on.

    tokens: (sequences, length) ids. held_out: how many of the last only evaluate. teacher: hidden states after the
    dense model's last block, in micro-batches of `micro_batch` sequences, of this process' share. ignored: ids whose
    prediction does not count (places of an image). may_keep: whether activations may take free memory.
    """

    tokens: Tensor
    teacher: Tensors
    held_out: int
    micro_batch: int
    ignored: Sequence[int] = ()
    may_keep: bool = True


@torch.no_grad()
def distill(
    backend: Backend, blocks: Sequence[str], text: DistillationText, on_change: Callable[[], None] = lambda: None
) -> tuple[float, float]:
    """Train by the KL divergence of the dense model's predictions from the pruned one's, in place.

    backend: of the pruned model, whose `blocks` are the paths of those that are left. One pass over the text; where
    that does not lower the divergence on the held-out text, the weights stay as they were. The final norm and the head
    stay, so that one head reads both streams. Of several processes each computes for the sequences whose dense hidden
    states it has, and all take the same steps. on_change: called before weights in files are changed. Returns the
    divergence on the held-out text before and after, in nats per token; zeros where there is nothing to train or to
    compensate. Raises NonFiniteLossError.
    """
    if len(text.tokens) <= text.held_out:
        return 0.0, 0.0
    training = _Distillation(backend, blocks, text)
    if not training.values:
        return 0.0, 0.0
    with inference_only(backend.model):
        return training.run(on_change)


Recorded = tuple[Tensor, Tensor | None, dict[str, Tensor]]
"""The input of a block, its output if the activations are kept, and what is trained in it."""


class _Distillation:
    """One training.

    vectors: by block, the names of its one-dimensional parameters. modules: by block, those with an update, by
    path. values: by name, in float32, the vectors and the factors of the updates, which lead where the model's own
    weights are coarser or in files. scales: of each value. kept: whether activations are kept for the backward pass,
    None until that is known.
    """

    def __init__(self, backend: Backend, blocks: Sequence[str], text: DistillationText) -> None:
        self.model, self.processes, self.progress = backend.model, backend.processes, backend.progress
        self.text, self.products = text, backend.products
        self.walker = BlockWalker(backend.model, blocks, products=backend.products)
        self.vectors: dict[str, list[str]] = {}
        self.modules: dict[str, dict[str, nn.Module]] = {}
        self.values: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor | float] = {}
        self.kept = None if text.may_keep and offloaded(backend.model) is None else False
        for path, block in zip(self.walker.paths, self.walker.blocks, strict=True):
            onload(self.model, path)
            self._add_vectors(path, block)
            self._add_updates(path, block)

    def _add_vectors(self, path: str, block: nn.Module) -> None:
        names = [f"{path}.{name}" for name, one in block.named_parameters() if one.dim() == 1 and len(one)]
        self.vectors[path] = [name for name in names if self.model.get_parameter(name).is_floating_point()]
        for name in self.vectors[path]:  # together on one device, so that sums do not depend on the placement
            value = at_least_float32(self.model.get_parameter(name).detach())
            self.values[name] = value.to(self.text.tokens.device, copy=True)
            size = value.square().mean().sqrt().clamp_min(LEAST_SCALE)
            self.scales[name] = (VECTOR_SHARE * size).to(self.values[name])

    def _add_updates(self, path: str, block: nn.Module) -> None:
        """Factors A (RANK, in), random, and B (out, RANK), zero: the update B A begins at zero."""
        self.modules[path] = {f"{path}.{name}": module for name, module in updated_modules(block).items()}
        for name, module in self.modules[path].items():
            weight = weight_out_in(module)
            outputs, inputs = weight.shape
            generator = torch.Generator().manual_seed(len(self.values))
            down = torch.randn(RANK, inputs, generator=generator) / math.sqrt(inputs)
            self.values[f"{name}.lora_A"] = down.to(self.text.tokens.device)
            self.values[f"{name}.lora_B"] = torch.zeros(outputs, RANK, device=self.text.tokens.device)
            self.scales[f"{name}.lora_A"] = DOWN_SCALE / math.sqrt(inputs)
            size = weight.float().square().mean().sqrt()
            self.scales[f"{name}.lora_B"] = float(UP_SCALE * size * math.sqrt(inputs / RANK))

    def run(self, on_change: Callable[[], None]) -> tuple[float, float]:
        """Train, and keep what is better. Returns the divergence before and after."""
        with self._narrow_matrices():
            before, after = self._train()
        if not before:
            return before, after
        on_change()
        for path in self.walker.paths:
            onload(self.model, path, change=True)
            self._put_vectors(path)
            for name, module in self.modules[path].items():
                weight = weight_out_in(module)
                update = self.values[f"{name}.lora_B"] @ self.values[f"{name}.lora_A"]
                weight.copy_(at_least_float32(weight) + update.to(weight.device))
        return before, after

    @contextmanager
    def _narrow_matrices(self) -> Iterator[None]:
        """Matrices in the type of the products where that holds all their values: then no use has to round them."""
        changed: list[tuple[nn.Parameter, torch.dtype]] = []
        matrices: list[Any] = [module.weight for modules in self.modules.values() for module in modules.values()]
        try:
            for weight in matrices if self.products is not None and offloaded(self.model) is None else ():
                narrow = weight.detach().to(self.products)
                if narrow.dtype != weight.dtype and torch.equal(narrow.to(weight.dtype), weight):
                    changed.append((weight, weight.dtype))
                    weight.data = narrow
            yield
        finally:
            for weight, dtype in changed:
                weight.data = weight.data.to(dtype)

    def _train(self) -> tuple[float, float]:
        rows = len(self.text.tokens) - self.text.held_out
        each = max(SEQUENCES, -(-rows // STEPS))
        count = -(-rows // each)
        # strided, as each process has the dense hidden states of sequences that follow each other
        steps = [range(first, rows, count) for first in range(count)]
        start = dict(self.values)
        before = self._divergence()
        if not math.isfinite(before):
            raise NonFiniteLossError("The pruned model's predictions are not finite", "Use --dtype float32")
        if before < ROUNDING:
            return 0.0, 0.0
        changes = {name: value.new_zeros(value.shape).requires_grad_() for name, value in self.values.items()}
        optimizer = torch.optim.Adam(changes.values(), lr=0.0, betas=BETAS)
        for done, step in enumerate(steps):
            gradients = self._gradients(step)
            for name, change in changes.items():
                change.grad = gradients.pop(name).to(change) * self.scales[name]
            torch.nn.utils.clip_grad_norm_(changes.values(), LARGEST_NORM)
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(done, len(steps))
            optimizer.step()
            optimizer.zero_grad()
            self.values = {name: start[name] + self.scales[name] * change for name, change in changes.items()}
            self.progress(done + 1, len(steps))
        after = self._divergence()
        if not after < before:  # or not finite
            self.values, after = start, before
        return before, after

    def _put_vectors(self, path: str) -> None:
        for name in self.vectors[path]:
            self.model.get_parameter(name).copy_(self.values[name])

    @contextmanager
    def _prepared(self, layer: int) -> Iterator[dict[str, Tensor]]:
        """A block, whose weights may be in files, as trained so far. Gives what to take gradients of, by name."""
        path = self.walker.paths[layer]
        onload(self.model, path)
        self._put_vectors(path)
        trained: dict[str, Tensor] = {name: self.model.get_parameter(name) for name in self.vectors[path]}
        hooks: dict[nn.Module, Callable[..., Any]] = {}
        for name, module in self.modules[path].items():
            factors = {key: self.values[key] for key in (f"{name}.lora_A", f"{name}.lora_B")}
            trained |= factors
            hooks[module] = _adding(*factors.values())
        with hooked(hooks, with_kwargs=True):
            yield trained

    def _own(self, rows: Iterable[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids and dense hidden states of those of the rows that are this process' share, some at a time."""
        text, size = self.text, self.text.micro_batch
        batches = self.processes.share(-(-len(text.tokens) // size))
        own = [row for row in rows if row // size in batches]
        at_once = max(1, TOKENS_AT_ONCE // text.tokens.shape[1])
        for first in range(0, len(own), at_once):
            part = own[first : first + at_once]
            hidden = [text.teacher[row // size - batches.start][row % size] for row in part]
            yield torch.stack([text.tokens[row] for row in part]), torch.stack(hidden)

    def _forward(self, tokens: Tensor, recorded: list[Recorded] | None = None) -> tuple[Tensor, Contexts]:
        """The output of the last block, and the blocks' contexts. recorded: to be filled for the backward pass."""
        stream = self.walker.start(tokens)
        if recorded is not None and self.kept is None:
            self.kept = self._kept_bytes(stream) <= most_kept(self.walker, self.processes.count)
        hidden = stream.hidden
        for layer in range(len(self.walker.blocks)):
            with self._prepared(layer) as trained:
                entry = hidden
                if recorded is None or not self.kept:
                    hidden = self.walker.run_block(layer, entry, stream.contexts)
                    output = None
                else:
                    entry, output = self.walker.run_recorded(layer, entry, stream.contexts, trained)
                    hidden = output.detach()
            if recorded is not None:
                recorded.append((entry, output, trained))
        return hidden, stream.contexts

    def _kept_bytes(self, stream: Stream) -> int:
        def run(layer: int, hidden: Tensor) -> Tensor:
            with self._prepared(layer) as trained:
                return self.walker.run_recorded(layer, hidden, stream.contexts, trained)[1]

        return kept_bytes(self.walker, stream, run)

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

    def _gradients(self, rows: range) -> dict[str, Tensor]:
        """Gradients of the values by the mean divergence over the tokens of some sequences, of all processes."""
        predictions = int(self._learned(self.text.tokens[rows.start : rows.stop : rows.step])[:, 1:].sum())
        found = {name: torch.zeros_like(value) for name, value in self.values.items()}
        for tokens, teacher in self._own(rows):
            recorded: list[Recorded] = []
            hidden, contexts = self._forward(tokens, recorded)
            with torch.enable_grad():
                _, gradient = self._losses(hidden, tokens, teacher, max(1, predictions))
            for layer in reversed(range(len(recorded))):
                entry, output, trained = recorded.pop()
                if output is not None:
                    gradient, of_values = gradients(entry, output, gradient, trained)
                else:
                    with self._prepared(layer) as trained:
                        gradient, of_values = self.walker.backward_to_weights(layer, entry, contexts, gradient, trained)
                for name, one in of_values.items():
                    found[name] += one.to(found[name])
        self.processes.add_up(list(found.values()))
        return found

    def _divergence(self) -> float:
        """Mean divergence over the held-out tokens, of all processes."""
        text, total, count = self.text, 0.0, 0.0
        for tokens, teacher in self._own(range(len(text.tokens) - text.held_out, len(text.tokens))):
            total += self._losses(self._forward(tokens)[0], tokens, teacher, 1)[0]
            count += int(self._learned(tokens)[:, 1:].sum())
        both = torch.tensor([total, count], dtype=widest_dtype(text.tokens.device), device=text.tokens.device)
        total, count = (float(one) for one in self.processes.total(both))
        return total / max(1, count)


def updated_modules(block: nn.Module) -> dict[str, nn.Module]:
    """By path, the linear modules of a block that get an update: those that only multiply and add their bias."""
    found = linear_modules(block).items()
    return {path: one for path, one in found if weight_out_in(one).numel() and only_multiplies(one)}


def _adding(down: Tensor, up: Tensor) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor]:
    """A hook that adds the update's share to what a linear module gives. down: (rank, in). up: (out, rank)."""

    def add(_: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> Tensor:
        (x,) = inputs or keywords.values()
        narrow = nn.functional.linear(x.to(output.dtype), down.to(output))
        return output + nn.functional.linear(narrow, up.to(output))

    return add


def _learning_rate(done: int, steps: int) -> float:
    """Of step `done`: a linear warm-up, then half a cosine towards 0."""
    return LEARNING_RATE * min(1.0, (done + 1) / WARM_UP_STEPS) * 0.5 * (1 + math.cos(math.pi * done / steps))
