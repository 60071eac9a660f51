"""The teacher of a recovery: loaded and checked, or replaced by its stored predictions."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import transformers
from filelock import FileLock
from torch import nn

from saap._version import __version__
from saap.core.errors import ConfigurationError, ModelError
from saap.core.records import digest_of
from saap.data.training import Example
from saap.discovery.blocks import find_blocks
from saap.export.placing import check_place
from saap.models.loading.devices import quick_products, working_dtype
from saap.models.loading.pretrained import load_model, model_without_weights
from saap.models.structure.linear import embedding_of
from saap.models.walk.probe import check_reads
from saap.models.walk.walker import BlockWalker
from saap.pipeline.recover.context import LOGITS_FLAG, Recovery
from saap.pipeline.shared import stages
from saap.pipeline.shared.dense_model import keep_tokens_of, tokens_of
from saap.pipeline.shared.digests import model_digest, tree_digest
from saap.recovery.teacher_logits import TeacherLogits, read_by


def check_teacher(run: Recovery) -> None:
    """Raise ConfigurationError for a teacher of another size than the dense model, or that predicts other tokens.

    No weights are read for it.
    """
    teacher, sizes = run.teacher, None if run.earlier is None else run.earlier.parameters
    if teacher is None:
        return
    skeleton = model_without_weights(teacher)
    found = sum(value.numel() for value in skeleton.parameters())
    # a file may have a head of its own where the configuration says that it is tied
    head: Any = embedding_of(skeleton, "output")
    table: Any = embedding_of(skeleton, "input")
    tied = head.weight.numel() if head is not None and head.weight is table.weight else 0
    if sizes is not None and sizes.before != sizes.after and sizes.before not in (found, found + tied):
        expected = f"{run.resolved.source} was pruned from a model of {sizes.before:,}"
        raise ConfigurationError(
            f"{teacher.source} has {found:,} parameters, but {expected}",
            "Specify that model with --dense, or use --distillation 0",
        )
    of_teacher, of_model = (output_rows(one) for one in (skeleton, model_without_weights(run.resolved)))
    if run.config.distillation and of_teacher != of_model and tokens_of(run.resolved) is None:
        raise ConfigurationError(
            f"{run.resolved.source} has {of_model:,} output rows, but its teacher {teacher.source} {of_teacher:,}",
            "Specify a dense model with as many rows with --dense, or use --distillation 0",
        )


def load_teacher(run: Recovery) -> Any | None:
    """The dense model, if it is known and here. Raises SaapError."""
    if run.teacher is None:
        return None
    with run.meter.stage(stages.LOAD_TEACHER):
        teacher = load_model(run.teacher, device=run.device)
        keep_tokens_of(teacher, tokens_of(run.resolved))
        check_fits(run, teacher)
    return teacher


def output_rows(model: Any) -> int:
    """Tokens that a model can predict."""
    head: Any = embedding_of(model, "output") or embedding_of(model, "input")
    rows: int = head.weight.shape[0]
    return rows


def check_fits(run: Recovery, model: Any) -> None:
    """Raise SaapError for training sequences that are too long, or token ids outside the vocabulary."""
    examples = [example.tokens for example in (*run.data.train, *run.data.held_out)]
    longest = run.config.length if run.config.on_policy else max(map(len, examples))
    check_reads(model, longest, "Use a smaller --max-seq-length")
    if run.config.on_policy and not hasattr(model, "generate"):
        raise ModelError(f"{type(model).__name__} has no `generate`", "Leave out --on-policy")
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(int(tokens.max()) for tokens in examples)
    if largest >= rows:
        offender = f"The tokenizer gave id {largest}, but the model's embedding has {rows} rows"
        raise ModelError(offender, "Use the tokenizer that belongs to the model")


def products_of(run: Recovery) -> torch.dtype | None:
    """The type that both models multiply in, None for their own."""
    return None if run.config.exact_products else quick_products(run.device)


def teacher_logits(run: Recovery) -> TeacherLogits | None:
    """The folder of the teacher's predictions, if there is one."""
    config, teacher = run.config, run.teacher
    if config.teacher_logits is None or teacher is None:
        return None
    rows = output_rows(model_without_weights(run.resolved))
    kept, sizes = tokens_of(run.resolved), None if run.earlier is None else run.earlier.parameters.before
    top_k = min(config.teacher_top_k, rows)

    def decisive() -> str:
        code = [[file.name, tree_digest(file)] for file in sorted(teacher.folder.glob("*.py"))]
        computed = [str(working_dtype(run.device, teacher.dtype)), str(products_of(run))]
        read = [model_digest(teacher), teacher.trust_remote_code, code, None if kept is None else kept.old_ids]
        return digest_of([*read, sizes, rows, *computed, __version__, transformers.__version__])

    digest = run.processes.broadcast_result(decisive)  # which reads all weights
    return TeacherLogits(folder=config.teacher_logits, top_k=top_k, teacher=digest)


def missing_sequences(run: Recovery, logits: TeacherLogits) -> list[Example]:
    """The sequences that the training reads and whose predictions are missing. Raises OutputError without room."""
    config = run.config
    read = read_by(run.data, batch=config.batch, steps=config.max_steps, tokens=config.max_tokens)

    def missing() -> list[int]:
        found = logits.missing(read)
        if found:
            needed = sum(logits.size(read[place]) for place in found)
            check_place(logits.folder / "*.safetensors", needed, LOGITS_FLAG)
        return found

    return [read[place] for place in run.processes.broadcast_result(missing)]


def store_predictions(run: Recovery, teacher: nn.Module, logits: TeacherLogits) -> None:
    """Write the missing predictions, which the processes share; another run with this folder waits.

    Raises OutputError, NonFiniteLossError.
    """
    walker = BlockWalker(teacher, find_blocks(teacher), products=products_of(run))
    logits.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(logits.folder / ".lock") if run.processes.first else nullcontext()
    with run.meter.stage(stages.STORE_PREDICTIONS), lock:
        sequences = missing_sequences(run, logits)
        run.meter.reporter.note(f"sequences missing in {logits.folder}: {len(sequences)}")
        own = sequences[run.processes.rank :: run.processes.count]
        for done, one in enumerate(own):
            logits.add(walker, one)
            run.meter.reporter.advance(done + 1, len(own))
        run.processes.barrier()
