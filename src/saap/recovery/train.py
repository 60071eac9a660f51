"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from saap.core.errors import NonFiniteLossError
from saap.data.training import Example, TrainingData
from saap.models.loading.precision import widest_dtype
from saap.models.walk.processes import Processes
from saap.models.walk.walker import BlockWalker, Stream
from saap.recovery.objective import loss_and_gradient
from saap.recovery.schedule import Limits, learning_rate
from saap.recovery.state import (
    BEST,
    STATE,
    LossPoint,
    Progress,
    load_parameters,
    load_state,
    save_parameters,
    save_state,
)
from saap.settings.recover import RecoverConfig

BETAS = (0.9, 0.95)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What a training did. validation: of its best parameters, which the model now has. stopped_by: in words."""

    points: tuple[LossPoint, ...]
    validation_before: float
    validation: float
    best_step: int
    tokens: int
    seconds: float
    stopped_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the caller is told. step: called with (thousandths of the way, 1000). line: a sentence now and then."""

    step: Callable[[int, int], None]
    line: Callable[[str], None]


class Trainer:
    """Trains `parameters` of the walker's model with AdamW; everything else stays as it is.

    parameters: by name, float32, the same in all processes. folder: for the state; a training that was interrupted
    goes on from there with the same losses (where the clock does not set the schedule). teacher: the dense model.
    """

    def __init__(
        self,
        walker: BlockWalker,
        parameters: Mapping[str, nn.Parameter],
        data: TrainingData,
        config: RecoverConfig,
        *,
        folder: Path,
        processes: Processes,
        report: Report,
        teacher: BlockWalker | None = None,
    ) -> None:
        self.walker, self.parameters, self.data, self.config = walker, dict(parameters), data, config
        self.folder, self.processes, self.report, self.teacher = folder, processes, report, teacher
        minutes = config.minutes
        self.limits = Limits(
            steps=config.max_steps, tokens=config.max_tokens, seconds=None if minutes is None else 60 * minutes
        )
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=0.0, betas=BETAS, weight_decay=0.0, foreach=False
        )

    def run(self) -> Training:
        """Train until a limit is reached or validation stops falling, and take the best parameters.

        Raises NonFiniteLossError; the last good state is then in the folder.
        """
        progress = self._begin()
        stopped_by = self._stopped(progress)
        while not stopped_by:
            clock = time.perf_counter()
            loss, rate, tokens = self._step(progress)
            progress.step += 1
            progress.tokens += tokens
            progress.seconds += self._since(clock)
            share = self.limits.share(progress.step, progress.tokens, progress.seconds)
            validation = None
            if share >= 1 or progress.step % self.config.validate_every == 0:
                clock = time.perf_counter()
                validation = self._validate(progress)
                progress.seconds += self._since(clock)
            stopped_by = self._stopped(progress)
            point = LossPoint(
                step=progress.step, tokens=progress.tokens, loss=loss, rate=rate, seconds=round(progress.seconds, 3),
                validation=validation,
            )  # fmt: skip
            progress.points.append(point)
            self.report.step(round(1000 * share), 1000)
            if validation is not None:
                self._keep(progress)
                self.report.line(_line(point, share))
        load_parameters(self.folder / BEST, self.parameters)
        return Training(
            points=tuple(progress.points), validation_before=progress.first_validation,
            validation=progress.best_validation, best_step=progress.best_step, tokens=progress.tokens,
            seconds=progress.seconds, stopped_by=stopped_by,
        )  # fmt: skip

    def _since(self, clock: float) -> float:
        """Seconds since then, the same in all processes."""
        seconds = torch.tensor([time.perf_counter() - clock], dtype=widest_dtype(self.device), device=self.device)
        return float(self.processes.total(seconds)) / self.processes.count

    def _begin(self) -> Progress:
        self.folder.mkdir(parents=True, exist_ok=True)
        progress = load_state(self.folder / STATE, self.parameters, self.optimizer)
        if progress is not None:
            self.report.line(f"going on after step {progress.step}")
            return progress
        progress = Progress()
        progress.first_validation = self._validate(progress)
        self.report.line(f"before training: validation {progress.first_validation:.4f}")
        return progress

    def _stopped(self, progress: Progress) -> str:
        """What ends the training here, in words; '' if nothing does."""
        limits = self.limits
        if limits.share(progress.step, progress.tokens, progress.seconds) < 1:
            patience = self.config.patience
            return "validation, which fell no more" if patience and progress.without_best >= patience else ""
        if limits.steps is not None and progress.step >= limits.steps:
            return f"the limit of {limits.steps} steps"
        if limits.tokens is not None and progress.tokens >= limits.tokens:
            return f"the limit of {limits.tokens:,} tokens"
        return f"the limit of {(limits.seconds or 0) / 60:g} minutes"

    def _keep(self, progress: Progress) -> None:
        if self.processes.first:
            save_state(self.folder / STATE, self.parameters, self.optimizer, progress)
        self.processes.barrier()

    def _step(self, progress: Progress) -> tuple[float, float, int]:
        """One step of the optimizer. Returns its loss, its learning rate and the tokens read by all processes."""
        indices = self.data.step_indices(progress.step, self.config.batch)
        examples = [self.data.train[index] for index in indices]
        predictions = sum(int(example.learned.sum()) for example in examples)
        tokens = sum(len(example.tokens) for example in examples)
        losses = torch.zeros(len(examples), dtype=widest_dtype(self.device), device=self.device)
        for part in _parts(range(self.processes.rank, len(examples), self.processes.count), self.config.micro_batch):
            ids, learned = self._padded([examples[place] for place in part])
            losses[part.start : part.stop : part.step] = self._gradients(ids, learned, predictions).to(losses.device)
        losses = self.processes.total(losses)
        self._sum_gradients()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip, foreach=False)
        self._require_finite(progress, losses, indices, float(norm))
        after = self.limits.share(
            progress.step + 1, progress.tokens + tokens,
            progress.seconds * (1 + 1 / progress.step) if progress.step else 0.0,
        )  # fmt: skip
        rate = learning_rate(self.config.learning_rate, after, self.config.warm_up)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(losses.sum()) / predictions, rate, tokens

    def _padded(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """(samples, length) ids and what is learned of them; shorter ones end in id 0, which no token before sees."""
        length = max(len(example.tokens) for example in examples)
        ids = torch.zeros(len(examples), length, dtype=torch.long)
        learned = torch.zeros(len(examples), length, dtype=torch.bool)
        for row, example in enumerate(examples):
            ids[row, : len(example.tokens)] = torch.from_numpy(example.tokens)
            learned[row, : len(example.tokens)] = torch.from_numpy(example.learned)
        return ids.to(self.device), learned.to(self.device)

    def _gradients(self, ids: Tensor, learned: Tensor, predictions: int) -> Tensor:
        """Add the gradients of a micro-batch to the parameters. Returns the summed loss of each sample."""
        taught = self._taught(ids)
        stream = self.walker.start(ids)
        hidden, inputs = self._forward(stream, keep_inputs=self.config.gradient_checkpointing)
        losses, gradient = loss_and_gradient(
            self.walker, hidden, ids, learned, predictions=predictions, teacher=taught,
            weight=self.config.distillation or 0.0,
        )  # fmt: skip
        if not self.config.gradient_checkpointing:
            torch.autograd.backward(hidden, gradient)
            return losses
        del hidden
        for layer in reversed(range(len(self.walker.blocks))):
            entry = inputs.pop().detach().requires_grad_(True)
            with torch.enable_grad():
                output = self.walker.run_block(layer, entry, stream.contexts)
            torch.autograd.backward(output, gradient)
            gradient = entry.grad
        return losses

    def _taught(self, ids: Tensor) -> tuple[BlockWalker, Tensor] | None:
        if self.teacher is None:
            return None
        with torch.no_grad():
            stream = self.teacher.start(ids)
            hidden = stream.hidden
            for layer in range(len(self.teacher.blocks)):
                hidden = self.teacher.run_block(layer, hidden, stream.contexts)
        return self.teacher, hidden

    def _forward(self, stream: Stream, *, keep_inputs: bool) -> tuple[Tensor, list[Tensor]]:
        """Output of the last block; with keep_inputs the block inputs and no graph, without them the graph."""
        inputs: list[Tensor] = []
        hidden = stream.hidden.detach()
        with torch.set_grad_enabled(not keep_inputs and torch.is_grad_enabled()):
            for layer in range(len(self.walker.blocks)):
                if keep_inputs:
                    inputs.append(hidden)
                hidden = self.walker.run_block(layer, hidden, stream.contexts)
        return hidden, inputs

    def _sum_gradients(self) -> None:
        for parameter in self.parameters.values():
            # a layer that no token of the batch reached (an expert) has none
            own = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            parameter.grad = self.processes.total(own)

    def _require_finite(self, progress: Progress, losses: Tensor, indices: Sequence[int], norm: float) -> None:
        if bool(losses.isfinite().all()) and math.isfinite(norm):
            return
        bad = [index for index, loss in zip(indices, losses.tolist(), strict=True) if not math.isfinite(loss)]
        what = f"The loss of training sample {bad[0]}" if bad else f"The gradient of samples {sorted(indices)}"
        kept = progress.points and (self.folder / STATE).is_file()
        where = f" (the state before it is kept in {self.folder})" if kept else ""
        raise NonFiniteLossError(
            f"{what} is not finite in step {progress.step + 1}{where}", "Lower --learning-rate, and check that sample"
        )

    @torch.no_grad()
    def _validate(self, progress: Progress) -> float:
        """Mean -log p of the held examples; the parameters are kept if it is the least so far."""
        held = self.data.held
        total = torch.zeros(1, dtype=widest_dtype(self.device), device=self.device)
        for start in range(0, len(held), self.processes.count):
            place = start + self.processes.rank
            # without an example of its own a process reads the first along: layers may be split over all
            ids, learned = self._padded([held[place if place < len(held) else 0]])
            hidden, _ = self._forward(self.walker.start(ids), keep_inputs=False)
            losses, _ = loss_and_gradient(self.walker, hidden, ids, learned, predictions=1, with_gradient=False)
            if place < len(held):
                total += losses.sum().to(total.device)
        value = float(self.processes.total(total)) / sum(int(example.learned.sum()) for example in held)
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"The validation loss is not finite after step {progress.step}", "Lower --learning-rate"
            )
        if value < progress.best_validation:
            progress.best_validation, progress.best_step, progress.without_best = value, progress.step, 0
            if self.processes.first:
                save_parameters(self.folder / BEST, self.parameters)
        else:
            progress.without_best += 1
        self.processes.barrier()
        return value


def _parts(places: range, size: int) -> list[range]:
    return [places[start : start + size] for start in range(0, len(places), size)]


def _line(point: LossPoint, share: float) -> str:
    speed = point.tokens / point.seconds if point.seconds else 0.0
    left = point.seconds / share * (1 - share) if share else 0.0
    return (
        f"step {point.step}: loss {point.loss:.4f}, validation {point.validation:.4f}, {speed:.0f} tokens/s, "
        f"about {left:.0f} s left"
    )
