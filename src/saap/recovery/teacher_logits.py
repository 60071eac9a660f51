"""The teacher's top-k log-probabilities on disk: for several trainings, and without the teacher in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from saap.core.errors import NonFiniteLossError, StaleInputError
from saap.core.records import digest_of
from saap.data.training import Example, TrainingData
from saap.models.checkpoint.safetensor_files import TensorEntry, write_tensors
from saap.models.walk.loss import LOGITS_AT_ONCE, TopPredictions, log_probabilities
from saap.models.walk.walker import BlockWalker

TOKENS, LOG_Q, TARGETS = "tokens", "log_probabilities", "target_log_probabilities"
BYTES = 4
"""Of an id, and of a logarithm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherLogits:
    """Files of a folder, one for each sequence, which trainings with the same teacher share.

    top_k: tokens that are stored of each prediction, at most the vocabulary. teacher: digest of what decides the
    predictions. A file has for each token but the last the ids of the most probable next tokens, (n - 1, k), their
    log-probabilities, and that of the token which follows, (n - 1,).
    """

    folder: Path
    top_k: int
    teacher: str

    def file(self, example: Example) -> Path:
        """The file of a sequence; predictions of another teacher, or of more tokens, have another name."""
        return self.folder / f"{digest_of([self.teacher, self.top_k, example.tokens])[:32]}.safetensors"

    def size(self, example: Example) -> int:
        """Bytes of its file, without the header."""
        return (len(example.tokens) - 1) * (2 * self.top_k + 1) * BYTES

    def missing(self, examples: Sequence[Example]) -> list[int]:
        """Places of the sequences without a file, or with a truncated one, each once."""
        found = {self.file(one): place for place, one in enumerate(examples)}
        return [
            place for path, place in found.items()
            if not path.is_file() or path.stat().st_size < self.size(examples[place])
        ]  # fmt: skip

    @torch.no_grad()
    def add(self, teacher: BlockWalker, example: Example) -> None:
        """Compute and write the file of a sequence. Raises OutputError, NonFiniteLossError."""
        ids = torch.from_numpy(example.tokens).to(next(teacher.model.parameters()).device)
        rows = teacher.run_blocks(teacher.start(ids[None]))[0, :-1]
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        start, at_once = 0, 16
        with teacher.rounded_head(rows.device):
            while start < len(rows):
                log_q = log_probabilities(teacher, rows[start : start + at_once])
                following = ids[start + 1 : start + 1 + len(log_q), None].to(log_q.device)
                most, tokens = log_q.topk(self.top_k)
                found.append((tokens.int(), most, log_q.gather(-1, following)[:, 0]))
                start, at_once = start + len(log_q), max(1, LOGITS_AT_ONCE // log_q.shape[-1])
        tokens, most, targets = (torch.cat(column) for column in zip(*found, strict=True))
        if not (most.isfinite().all() and targets.isfinite().all()):
            raise NonFiniteLossError("The teacher's predictions are not finite", "Check --dense")
        columns = {TOKENS: tokens, LOG_Q: most, TARGETS: targets}
        entries = {name: TensorEntry.of(tensor) for name, tensor in columns.items()}
        write_tensors(self.file(example), entries, {"format": "pt"})

    def predictions(self, examples: Sequence[Example], device: torch.device) -> TopPredictions:
        """Those of some sequences, (samples, length - 1, k), padded at the end. Raises StaleInputError."""
        columns = zip(*(self._read(one, TOKENS, LOG_Q) for one in examples), strict=True)
        return TopPredictions(*(pad_sequence(list(column), batch_first=True).to(device) for column in columns))

    def loss(self, examples: Sequence[Example]) -> float:
        """Mean -log p of the learned tokens of some sequences. Raises StaleInputError."""
        values = [self._read(one, TARGETS)[0][torch.from_numpy(one.learned[1:])] for one in examples]
        return -float(torch.cat(values).double().mean())

    def _read(self, example: Example, *names: str) -> list[Tensor]:
        path = self.file(example)
        try:
            with safe_open(path, framework="pt") as file:
                return [file.get_tensor(name) for name in names]
        except (SafetensorError, OSError) as error:
            what = f"{path} has no log-probabilities of the teacher ({error})"
            raise StaleInputError(what, "Delete it and start again; several machines need a shared folder") from None


def read_by(data: TrainingData, *, batch: int, steps: int | None, tokens: int | None) -> list[Example]:
    """The sequences that a training up to the first of these limits reads, and those held out, each once."""
    found: dict[int, Example] = {}
    step = done = 0
    while (steps is None or step < steps) and (tokens is None or done < tokens) and len(found) < len(data.train):
        for place in data.step_indices(step, batch):
            found[place] = data.train[place]
            done += len(data.train[place].tokens)
        step += 1
    return [*data.held_out, *found.values()]
