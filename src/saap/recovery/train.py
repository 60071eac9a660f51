"""The training loop and its state on disk, from which an interrupted training resumes exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from saap.core.errors import NonFiniteLossError, StaleInputError
from saap.core.manifest import CurvePoint
from saap.data.training import Example, TrainingData
from saap.models.checkpoint.safetensor_files import TensorEntry, write_tensors
from saap.models.loading.precision import widest_dtype
from saap.models.walk.activations import kept_bytes, most_kept
from saap.models.walk.loss import TopPredictions, learned_losses
from saap.models.walk.processes import Processes
from saap.models.walk.walker import BlockWalker, Stream
from saap.recovery.adapter import tuned_matrices
from saap.recovery.on_policy import AT_ONCE, continued
from saap.recovery.teacher_logits import TeacherLogits
from saap.settings.recover import RecoverConfig, Tuning

BETAS = (0.9, 0.95)
STATE, BEST = "state.safetensors", "best.safetensors"
LEAST_SHARE = 1e-3
RATES = {Tuning.FULL: 1e-3, Tuning.LORA: 5e-3, Tuning.GROUPWISE: 5e-3}
"""Default peak learning rates relative to the size of the tuned matrices, which differs tenfold over models."""
ROUTER_RATE = 1e-3


def share_done(config: RecoverConfig, steps: int, tokens: int, seconds: float) -> float:
    """Progress of the training towards its nearest limit: 1 at the end and beyond."""
    limits = (config.max_steps, config.max_tokens, None if config.minutes is None else 60 * config.minutes)
    done = zip((steps, tokens, seconds), limits, strict=True)
    return min(1.0, max((value / limit for value, limit in done if limit is not None), default=0.0))


def learning_rate(peak: float, share: float, warm_up: float) -> float:
    """Linear from 0 to `peak` over the first `warm_up` of the training, then half a cosine down to 0.

    share: of the training, 0 to 1. Source: SGDR (Loshchilov & Hutter 2017), one cycle.
    """
    share = max(share, LEAST_SHARE)
    if share < warm_up:
        return peak * share / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (share - warm_up) / (1 - warm_up)))


def peak_rate(config: RecoverConfig, matrices: Iterable[Tensor]) -> float:
    """The peak learning rate. The default is relative to the median root mean square of the matrices, to one digit.

    All weights: 2e-4 for SmolLM2-135M, 2e-5 for Qwen2.5-Coder 0.5B. Adapters: 1e-3 and 8e-5.
    """
    if config.learning_rate is not None or config.tuning is Tuning.ROUTER:
        return config.learning_rate or ROUTER_RATE
    sizes = sorted(float(one.detach().float().square().mean().sqrt()) for one in matrices)
    return float(f"{RATES[config.tuning] * sizes[len(sizes) // 2]:.0e}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Progress callbacks. step: called with (thousandths of the training, 1000). line: occasional messages."""

    step: Callable[[int, int], None]
    line: Callable[[str], None]


class Training(BaseModel):
    """State of a training.

    validation: of the best parameters so far, after `best_step` (0: before the first step). validation_teacher: of the
    teacher, if there is one. without_best: number of validations since the best. on_policy: whether that part has
    begun; then the best parameters are chosen anew. stopped_by: reason of the end in words; '' while it runs.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    validation_before: float = float("inf")
    validation_teacher: float | None = None
    validation: float = float("inf")
    best_step: int = 0
    without_best: int = 0
    on_policy: bool = False
    points: list[CurvePoint] = []
    stopped_by: str = ""


@dataclass(eq=False)
class Trainer:
    """Trains `parameters` of the walker's model with AdamW; everything else is frozen.

    parameters: by name, float32, the same in all processes. folder: for the state, from which an interrupted training
    resumes with the same losses (unless the schedule depends on the clock). teacher: the dense model, or what it
    predicts of all sequences that are read. ends: the end-of-text tokens, for what the model writes itself.
    """

    walker: BlockWalker
    parameters: Mapping[str, nn.Parameter]
    data: TrainingData
    config: RecoverConfig
    _: KW_ONLY
    folder: Path
    processes: Processes
    report: Report
    teacher: BlockWalker | TeacherLogits | None = None
    ends: Collection[int] = ()

    def __post_init__(self) -> None:
        self.device = next(iter(self.parameters.values())).device
        self.peak_rate = peak_rate(self.config, tuned_matrices(self.walker.model, self.parameters))
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=0.0, betas=BETAS, weight_decay=0.0, fused=True
        )
        self._written: dict[int, list[Example]] = {}
        self._kept = 0, 0  # the most tokens so far of a micro-batch, and the bytes that its activations take
        self.state: dict[str, Tensor] = dict(self.parameters)  # and the optimizer state, updated in place
        for name, value in self.parameters.items():
            moments = {"exp_avg": torch.zeros_like(value), "exp_avg_sq": torch.zeros_like(value)}
            self.optimizer.state[value] = {"step": torch.zeros((), device=value.device), **moments}
            self.state |= {f"{name}/{key}": tensor for key, tensor in self.optimizer.state[value].items()}

    def run(self) -> Training:
        """Train until a limit is reached or the validation loss stops falling, then load the best parameters.

        Raises NonFiniteLossError; the last good state is then in the folder.
        """
        training = self._begin()
        while not (stopped_by := self._stopped(training)):
            clock = time.perf_counter()
            loss, rate, tokens = self._step(training)
            training.step += 1
            training.tokens += tokens
            training.seconds += self._since(clock)
            share = share_done(self.config, training.step, training.tokens, training.seconds)
            validation = None
            if share >= 1 or training.step % self.config.validate_every == 0:
                clock = time.perf_counter()
                validation = self._validate(training)
                training.seconds += self._since(clock)
            point = CurvePoint(
                step=training.step, tokens=training.tokens, loss=loss, rate=rate, seconds=round(training.seconds, 3),
                validation=validation,
            )  # fmt: skip
            training.points.append(point)
            self.report.step(round(1000 * share), 1000)
            if validation is not None:
                self._write(STATE, self.state, training)
                self.report.line(_line(point, validation, share, training))
        _read_state(self.folder / BEST, self.parameters)
        training.stopped_by, training.seconds = stopped_by, round(training.seconds, 3)
        return training

    @property
    def missing_bytes(self) -> int:
        """Bytes that the folder still takes at most: of the best parameters, the state, and its replacement."""
        state, best = (sum(one.nbytes for one in each.values()) for each in (self.state, self.parameters))
        files = (self.folder / name for name in (STATE, BEST))
        return max(0, 2 * state + best - sum(file.stat().st_size for file in files if file.is_file()))

    def seconds_of_token(self) -> float:
        """Measured in two steps after a first one; the parameters change."""
        self._step(Training())
        clock = time.perf_counter()
        tokens = sum(self._step(Training(step=step))[2] for step in (1, 2))
        return self._since(clock) / tokens

    def _since(self, clock: float) -> float:
        """Seconds since then, averaged over the processes so that all of them use one clock."""
        seconds = torch.tensor([time.perf_counter() - clock], dtype=widest_dtype(self.device), device=self.device)
        return float(self.processes.total(seconds)) / self.processes.count

    def _begin(self) -> Training:
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / STATE).is_file():
            training = _read_state(self.folder / STATE, self.state)
            self.report.line(f"resuming after step {training.step}")
            return training
        training = Training(validation_teacher=self.teacher_loss())
        self._validate(training)
        of_teacher = "" if training.validation_teacher is None else f" (the teacher {training.validation_teacher:.4f})"
        self.report.line(f"before training: validation {training.validation_before:.4f}{of_teacher}")
        self.report.line(f"peak learning rate {self.peak_rate:g}")
        return training

    def _stopped(self, training: Training) -> str:
        """Reason to end the training now, in words; '' if there is none."""
        config = self.config
        if share_done(config, training.step, training.tokens, training.seconds) < 1:
            decided = training.on_policy or not config.on_policy
            stale = decided and config.patience and training.without_best >= config.patience
            return "validation, which fell no more" if stale else ""
        if config.max_steps is not None and training.step >= config.max_steps:
            return f"the limit of {config.max_steps} steps"
        if config.max_tokens is not None and training.tokens >= config.max_tokens:
            return f"the limit of {config.max_tokens:,} tokens"
        return f"the limit of {config.minutes or 0:g} minutes"

    def _write(self, name: str, tensors: Mapping[str, Tensor], training: Training) -> None:
        """Write tensors and training state atomically. Raises OutputError."""
        if self.processes.first:
            entries = {key: TensorEntry.of(tensor) for key, tensor in tensors.items()}
            metadata = {"format": "pt", "training": training.model_dump_json()}
            write_tensors(self.folder / name, entries, metadata)
        self.processes.barrier()

    def _step(self, training: Training) -> tuple[float, float, int]:
        """One optimizer step. Returns its loss, its learning rate and the tokens of all processes."""
        examples = self._examples(training)
        if self.teacher is not None and self.config.distillation == 1:  # which has a target for prompts too
            examples = [replace(one, learned=np.arange(len(one.tokens)) > 0) for one in examples]
        predictions = sum(int(example.learned.sum()) for example in examples)
        tokens = sum(len(example.tokens) for example in examples)
        losses = torch.zeros(len(examples), dtype=widest_dtype(self.device), device=self.device)
        own = range(self.processes.rank, len(examples), self.processes.count)
        for start in range(0, len(own), self.config.micro_batch):
            part = own[start : start + self.config.micro_batch]
            found = self._gradients([examples[place] for place in part], predictions)
            losses[part.start : part.stop : part.step] = found.to(losses.device)
        losses = self.processes.total(losses)
        self._sum_gradients()
        norm = clip_grad_norm_(self.parameters.values(), self.config.clip, foreach=False)
        self._require_finite(training, losses, float(norm))
        seconds = training.seconds * (1 + 1 / training.step) if training.step else 0.0
        before = share_done(self.config, training.step, training.tokens, training.seconds)
        after = share_done(self.config, training.step + 1, training.tokens + tokens, seconds)
        # in the middle of the step: at the end of the last one the rate is 0
        rate = learning_rate(self.peak_rate, (before + after) / 2, self.config.warm_up)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(losses.sum()) / predictions, rate, tokens

    def _examples(self, training: Training) -> list[Example]:
        """The examples of this step; in the last part of the training, with what the model itself writes."""
        step, config = training.step, self.config
        done = share_done(config, step, training.tokens, training.seconds)
        if not config.on_policy or done < 1 - config.on_policy:
            return self._read(step)
        if not training.on_policy:
            training.on_policy, training.validation, training.without_best = True, float("inf"), 0
        if step not in self._written:
            # up to the next validation, where a training can be resumed: it then writes the same
            last = min(step + -(-AT_ONCE // config.batch), (step // config.validate_every + 1) * config.validate_every)
            read = {each: self._read(each) for each in range(step, last)}
            seed = (config.seed + step) * self.processes.count + self.processes.rank
            own = [one for examples in read.values() for one in examples[self.processes.rank :: self.processes.count]]
            made = continued(self.walker.model, own, length=config.length, ends=self.ends, seed=seed)
            parts = [iter(part) for part in self.processes.gather(made)]
            self._written = {
                each: [next(parts[place % len(parts)]) for place in range(len(examples))]
                for each, examples in read.items()
            }
        return self._written[step]

    def _read(self, step: int) -> list[Example]:
        return [self.data.train[index] for index in self.data.step_indices(step, self.config.batch)]

    def _padded(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """(samples, length) ids and their loss masks; shorter sequences are padded with id 0 at the end."""
        ids = pad_sequence([torch.from_numpy(example.tokens) for example in examples], batch_first=True)
        learned = pad_sequence([torch.from_numpy(example.learned) for example in examples], batch_first=True)
        return ids.to(self.device), learned.to(self.device)

    def _gradients(self, examples: Sequence[Example], predictions: int) -> Tensor:
        """Accumulate the gradients of a micro-batch. Returns the summed loss of each sample."""
        ids, learned = self._padded(examples)
        teacher: TopPredictions | tuple[BlockWalker, Tensor] | None = None
        if isinstance(self.teacher, TeacherLogits):
            teacher = self.teacher.predictions(examples, self.device)
        elif self.teacher is not None:
            with torch.no_grad():
                teacher = self.teacher, self._forward(self.teacher, ids)
        hidden = self._forward(self.walker, ids)
        losses, gradient = learned_losses(
            self.walker, hidden, ids, learned, predictions=predictions, teacher=teacher,
            weight=self.config.distillation or 0.0,
        )  # fmt: skip
        torch.autograd.backward(hidden, gradient)
        return losses

    def _forward(self, walker: BlockWalker, ids: Tensor) -> Tensor:
        """Output of the last block, with an autograd graph if gradients are enabled."""
        stream = walker.start(ids)
        hidden, run = stream.hidden, walker.run_block
        if torch.is_grad_enabled() and self._recomputes(stream):
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        for layer in range(len(walker.blocks)):
            hidden = run(layer, hidden, stream.contexts)
        return hidden

    def _recomputes(self, stream: Stream) -> bool:
        """Whether activations are recomputed in the backward pass: as the settings say, or if memory is short."""
        if self.config.gradient_checkpointing is not None:
            return self.config.gradient_checkpointing
        if self.config.shard:  # all processes have to read the weights equally often
            return True
        tokens = stream.hidden.shape[:2].numel()
        if tokens > self._kept[0]:
            self._kept = tokens, kept_bytes(self.walker, stream)
        return self._kept[1] > most_kept(self.walker, self.processes.count)

    def _sum_gradients(self) -> None:
        """Sum the gradients of all processes in one exchange."""
        for parameter in self.parameters.values():
            if parameter.grad is None:  # a layer without tokens in the batch (an expert)
                parameter.grad = torch.zeros_like(parameter)
        self.processes.add_up([parameter.grad for parameter in self.parameters.values() if parameter.grad is not None])

    def _require_finite(self, training: Training, losses: Tensor, norm: float) -> None:
        if bool(losses.isfinite().all()) and math.isfinite(norm):
            return
        indices = self.data.step_indices(training.step, self.config.batch)
        bad = [index for index, loss in zip(indices, losses.tolist(), strict=True) if not math.isfinite(loss)]
        what = f"The loss of training sample {bad[0]}" if bad else f"The gradient of samples {sorted(indices)}"
        kept = training.points and (self.folder / STATE).is_file()
        where = f" (the state before it is kept in {self.folder})" if kept else ""
        raise NonFiniteLossError(
            f"{what} is not finite in step {training.step + 1}{where}", "Lower --learning-rate, and check that sample"
        )

    def _validate(self, training: Training) -> float:
        """Loss of the held-out examples; writes the parameters if it is the lowest so far."""
        value = self.held_out_loss(self.walker, training.step)
        if training.step == 0:
            training.validation_before = value
        training.without_best += 1
        if value < training.validation:
            training.validation, training.best_step, training.without_best = value, training.step, 0
            self._write(BEST, self.parameters, training.model_copy(update={"points": []}))
        return value

    def teacher_loss(self) -> float | None:
        """Mean -log p of the held-out examples by the teacher, None without one. Raises NonFiniteLossError."""
        if isinstance(self.teacher, TeacherLogits):
            return self.teacher.loss(self.data.held_out)
        return None if self.teacher is None else self.held_out_loss(self.teacher, remedy="Check --dense")

    @torch.no_grad()
    def held_out_loss(self, walker: BlockWalker, step: int = 0, remedy: str = "Lower --learning-rate") -> float:
        """Mean -log p of the held-out examples by the walker's model, after that step. Raises NonFiniteLossError."""
        examples = self.data.held_out
        total = torch.zeros(1, dtype=widest_dtype(self.device), device=self.device)
        for start in range(0, len(examples), self.processes.count):
            place = start + self.processes.rank
            # a process without own examples runs the first one too: layers may be sharded over all processes
            ids, learned = self._padded([examples[place if place < len(examples) else 0]])
            hidden = self._forward(walker, ids)
            losses, _ = learned_losses(walker, hidden, ids, learned, predictions=1)
            if place < len(examples):
                total += losses.sum().to(total.device)
        value = float(self.processes.total(total)) / sum(int(example.learned.sum()) for example in examples)
        if not math.isfinite(value):
            raise NonFiniteLossError(f"The validation loss is not finite after step {step}", remedy)
        return value


def gap_closed(teacher: float, before: float, after: float) -> float | None:
    """Share of the gap in loss to the teacher that is closed, negative if it grew; None without a gap."""
    gap = before - teacher
    return (before - after) / gap if gap > 0 else None


def _line(point: CurvePoint, validation: float, share: float, training: Training) -> str:
    speed = point.tokens / point.seconds if point.seconds else 0.0
    left = point.seconds / share * (1 - share) if share else 0.0
    teacher, before = training.validation_teacher, training.validation_before
    share_closed = None if teacher is None else gap_closed(teacher, before, validation)
    closed = "" if share_closed is None else f" ({share_closed:.0%} of the gap closed)"
    return (
        f"step {point.step}: loss {point.loss:.4f}, validation {validation:.4f}{closed}, {speed:.0f} tokens/s, "
        f"about {left:.0f} s left"
    )


@torch.no_grad()
def _read_state(path: Path, tensors: Mapping[str, Tensor]) -> Training:
    """Read what `Trainer._write` wrote into the tensors, in place. Raises StaleInputError for another file."""
    try:
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != set(tensors):
                raise ValueError("it is of other parameters")
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))
            return Training.model_validate_json((file.metadata() or {}).get("training", ""))
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise StaleInputError(f"{path} is not a state of this training ({error})", f"Delete {path.parent}") from None
