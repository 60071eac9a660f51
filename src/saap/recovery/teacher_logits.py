"""What the teacher predicts of the training sequences, on disk: for several trainings, and without it in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from saap.core.errors import StaleInputError
from saap.core.records import digest_of
from saap.data.training import Example, TrainingData
from saap.models.checkpoint.safetensor_files import TensorEntry, write_tensors
from saap.models.walk.loss import LOGITS_AT_ONCE, TopPredictions
from saap.models.walk.walker import BlockWalker

TOKENS, LOG_Q, TARGETS = "tokens", "log_probabilities", "target_log_probabilities"
BYTES = 4
"""Of an id, and of a logarithm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherLogits:
    """Files of a folder, one for each sequence, which trainings with the same teacher share.

    top_k: tokens that are kept of each prediction. teacher: digest of what decides the predictions. A file has for each
    token but the last the ids of the most predicted tokens, (n - 1, k), their log-probabilities, and that of the token
    which follows, (n - 1,).
    """

    folder: Path
    top_k: int
    teacher: str

    def file(self, example: Example) -> Path:
        """The file of a sequence; predictions of another teacher, or of more tokens, have another name."""
        return self.folder / f"{digest_of([self.teacher, self.top_k, example.tokens])[:32]}.safetensors"

    def size(self, example: Example) -> int:
        """Bytes of its file, about."""
        return len(example.tokens) * (2 * self.top_k + 1) * BYTES

    @torch.no_grad()
    def add(self, teacher: BlockWalker, example: Example) -> None:
        """Compute and write the file of a sequence. Raises OutputError."""
        ids = torch.from_numpy(example.tokens).to(next(teacher.model.parameters()).device)
        rows = teacher.run_blocks(teacher.start(ids[None]))[0, :-1]
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        at_once = 16
        with teacher.rounded_head(rows.device):
            while (start := sum(len(one) for _, one, _ in found)) < len(rows):
                # sequences of one token: a single one of them all could be longer than the model reads
                log_q = teacher.logits(rows[start : start + at_once, None])[:, 0].log_softmax(-1, dtype=torch.float32)
                following = ids[start + 1 : start + 1 + len(log_q), None].to(log_q.device)
                most, tokens = log_q.topk(min(self.top_k, log_q.shape[-1]))
                found.append((tokens.int(), most, log_q.gather(-1, following)[:, 0]))
                at_once = max(1, LOGITS_AT_ONCE // log_q.shape[-1])
        columns = dict(zip((TOKENS, LOG_Q, TARGETS), map(torch.cat, zip(*found, strict=True)), strict=True))
        entries = {name: TensorEntry.of(tensor) for name, tensor in columns.items()}
        write_tensors(self.file(example), entries, {"format": "pt"})

    def predictions(self, examples: Sequence[Example], device: torch.device) -> TopPredictions:
        """Those of some sequences, (samples, length - 1, k), padded at the end. Raises StaleInputError."""
        tokens, log_q = (
            pad_sequence([self._read(one, name) for one in examples], batch_first=True) for name in (TOKENS, LOG_Q)
        )
        return TopPredictions(tokens.to(device), log_q.to(device))

    def loss(self, examples: Sequence[Example]) -> float:
        """Mean -log p of the learned tokens of some sequences. Raises StaleInputError."""
        values = [self._read(one, TARGETS)[torch.from_numpy(one.learned[1:])] for one in examples]
        return -float(torch.cat(values).double().mean())

    def _read(self, example: Example, name: str) -> Tensor:
        path = self.file(example)
        try:
            with safe_open(path, framework="pt") as file:
                found: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise StaleInputError(f"{path} has no predictions of the teacher ({error})", "Delete it") from None
        if len(found) != len(example.tokens) - 1:
            raise StaleInputError(f"{path} has predictions of another sequence", "Delete it")
        return found


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
