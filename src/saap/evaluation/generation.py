"""What a model writes: diversity, repetition, agreement with the dense model, coherence, facts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from saap.core.errors import EvaluationError, ModelError
from saap.evaluation.perplexity import model_logits
from saap.models.walk.probe import check_reads

BUNDLED = "bundled"
QUARTERS = 4
TOP_P = 0.95


class Prompt(BaseModel):
    """One prompt. answer: what a cloze prompt is to be continued with, None for an open one."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    answer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The continuation of one prompt. ids: its tokens without the end token."""

    prompt: str
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationFigures:
    """Measures of the continuations of all open prompts in one mode.

    distinct_1..3: distinct n-grams over all. repetition: seq-rep-4. tokens: mean length. dense_perplexity: of the
    continuations under the dense model, given their prompts. dense_perplexity_by_quarter, repetition_by_quarter: the
    same over the first to the last quarter of each: text that falls apart gets worse along the way.
    """

    distinct_1: float
    distinct_2: float
    distinct_3: float
    repetition: float
    tokens: float
    dense_perplexity: float | None
    dense_perplexity_by_quarter: tuple[float, ...] | None
    repetition_by_quarter: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClozeFigures:
    """Facts: how many of `prompts` the model continues with the answer, and the mean log-likelihood of the answers.

    An answer counts if each of its tokens is the most likely one. answer_nll: nats per token.
    """

    accuracy: float
    answer_nll: float
    prompts: int
    correct: tuple[int, ...]


def read_prompts(source: str | Path) -> tuple[Prompt, ...]:
    """The prompts of a file, or `bundled` ones.

    .txt: one prompt a line. .jsonl: an object with `prompt` and perhaps `answer` a line. Raises EvaluationError.
    """
    if str(source) == BUNDLED:
        lines = (resources.files("saap.evaluation") / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
        return tuple(Prompt.model_validate_json(line) for line in lines)
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"the prompts {path} cannot be read ({error})", "Give a UTF-8 .txt or .jsonl") from error
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found.append(Prompt.model_validate(json.loads(line)) if path.suffix == ".jsonl" else Prompt(prompt=line))
        except (json.JSONDecodeError, ValidationError):
            raise EvaluationError(
                f"{path}, line {number}, is no prompt", 'Write it as {"prompt": "...", "answer": "..."}'
            ) from None
    if not found:
        raise EvaluationError(f"{path} has no prompts", "Give one a line")
    return tuple(found)


def prompt_ids(tokenizer: Any, prompt: str, *, chat: bool = True) -> list[int]:
    """Token ids of a prompt, as the user's turn of a chat where the tokenizer has a template and `chat` asks for it."""
    if chat and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}]
        made = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return [int(token) for token in made["input_ids"]]
    return [int(token) for token in tokenizer(prompt)["input_ids"]]


def check_prompts(model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], tokens: int) -> None:
    """Refuse a model that cannot read the longest prompt and what follows it. Raises UnsupportedModelError."""
    lengths = [
        len(prompt_ids(tokenizer, one.prompt, chat=one.answer is None))
        + (tokens if one.answer is None else len(_answer_ids(tokenizer, one.answer)))
        for one in prompts
    ]
    check_reads(model, max(lengths, default=0), "Use fewer --max-new-tokens or shorter prompts")


@torch.no_grad()
def write(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, tokens: int, sampled: bool, seed: int = 0, chat: bool = True
) -> list[Written]:
    """Continuations of at most `tokens` tokens: greedy, or sampled at temperature 1 from the top 95 % of the mass.

    The same seed gives each prompt the same random numbers with every model. Raises ModelError for a model that
    cannot generate.
    """
    if not hasattr(model, "generate"):
        raise ModelError(f"{type(model).__name__} has no `generate`", "Use a transformers model")
    device = next(model.parameters()).device
    end = tokenizer.eos_token_id
    written = []
    for index, prompt in enumerate(prompts):
        ids = torch.tensor([prompt_ids(tokenizer, prompt, chat=chat)], device=device)
        torch.manual_seed(seed + index)
        options: dict[str, Any] = {"do_sample": False}
        if sampled:
            options = {"do_sample": True, "temperature": 1.0, "top_p": TOP_P, "top_k": 0}
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
            pad_token_id=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id, **options,
        )[0, ids.shape[1] :].tolist()  # fmt: skip
        if end in made:
            made = made[: made.index(end)]
        text = str(tokenizer.decode(made, skip_special_tokens=True))
        written.append(Written(prompt=prompt, text=text, ids=tuple(made)))
    return written


@torch.no_grad()
def continuation_nll(model: nn.Module, context: Sequence[int], continuation: Sequence[int]) -> Tensor:
    """-log p of each token of `continuation` after `context` and the tokens before it, in nats: (tokens,) float64."""
    logits = _continuation_logits(model, context, continuation)
    wanted = torch.tensor(list(continuation), device=logits.device)
    return nn.functional.cross_entropy(logits.float(), wanted, reduction="none").cpu().double()


@torch.no_grad()
def followed_by(model: nn.Module, context: Sequence[int], continuation: Sequence[int]) -> list[int]:
    """The most likely token at each position of `continuation`, given the context and the tokens before it."""
    return [int(token) for token in _continuation_logits(model, context, continuation).argmax(-1)]


def _continuation_logits(model: nn.Module, context: Sequence[int], continuation: Sequence[int]) -> Tensor:
    if not context:
        raise EvaluationError("a prompt without tokens gives nothing to continue", "Leave out empty prompts")
    device = next(model.parameters()).device
    ids = torch.tensor([[*context, *continuation]], device=device)
    return model_logits(model, ids)[0, len(context) - 1 : -1]


def generation_figures(
    written: Sequence[Written],
    dense: nn.Module | None,
    tokenizer: Any,
    *,
    chat: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> GenerationFigures:
    """Measures of what a model wrote. dense: the dense model, None leaves out what it judges."""
    sequences = [one.ids for one in written]
    quarters = [parts(ids, QUARTERS) for ids in sequences if len(ids) >= QUARTERS]
    losses: list[Tensor] = []
    if dense is not None:
        for index, one in enumerate(written):
            if one.ids:
                losses.append(continuation_nll(dense, prompt_ids(tokenizer, one.prompt, chat=chat), one.ids))
            if progress is not None:
                progress(index + 1, len(written))
    return GenerationFigures(
        distinct_1=distinct(sequences, 1),
        distinct_2=distinct(sequences, 2),
        distinct_3=distinct(sequences, 3),
        repetition=repetition(sequences),
        tokens=sum(len(ids) for ids in sequences) / max(1, len(sequences)),
        dense_perplexity=_perplexity(losses),
        dense_perplexity_by_quarter=_by_quarter(losses),
        repetition_by_quarter=tuple(repetition([each[index] for each in quarters]) for index in range(QUARTERS)),
    )


def _perplexity(losses: Sequence[Tensor]) -> float | None:
    return math.exp(float(torch.cat(list(losses)).mean())) if losses else None


def _by_quarter(losses: Sequence[Tensor]) -> tuple[float, ...] | None:
    long = [loss for loss in losses if len(loss) >= QUARTERS]
    if not long:
        return None
    size = [len(loss) // QUARTERS for loss in long]
    pieces = [
        torch.cat([loss[index * n : (index + 1) * n] for loss, n in zip(long, size, strict=True)])
        for index in range(QUARTERS)
    ]
    return tuple(math.exp(float(piece.mean())) for piece in pieces)


def token_agreement(
    model: nn.Module, dense_written: Sequence[Written], tokenizer: Any, *, chat: bool = True
) -> float | None:
    """Share of the dense model's greedy tokens that `model` also finds the most likely, given the dense model's text.

    None if the dense model wrote nothing.
    """
    wanted: list[int] = []
    found: list[int] = []
    for one in dense_written:
        if one.ids:
            wanted += one.ids
            found += followed_by(model, prompt_ids(tokenizer, one.prompt, chat=chat), one.ids)
    return agreement(wanted, found) if wanted else None


def cloze(model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt]) -> ClozeFigures | None:
    """Facts: prompts that have an answer, as plain text without a chat template. None if no prompt has one."""
    correct: list[int] = []
    losses: list[Tensor] = []
    for prompt in prompts:
        if prompt.answer is None:
            continue
        answer = _answer_ids(tokenizer, prompt.answer)
        context = prompt_ids(tokenizer, prompt.prompt.rstrip(), chat=False)
        correct.append(int(followed_by(model, context, answer) == answer))
        losses.append(continuation_nll(model, context, answer))
    if not correct:
        return None
    return ClozeFigures(
        accuracy=sum(correct) / len(correct),
        answer_nll=float(torch.cat(losses).mean()),
        prompts=len(correct),
        correct=tuple(correct),
    )


def _answer_ids(tokenizer: Any, answer: str) -> list[int]:
    return list(tokenizer(f" {answer.strip()}", add_special_tokens=False)["input_ids"])


def _ngrams(sequence: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(sequence[start : start + n]) for start in range(len(sequence) - n + 1)]


def distinct(sequences: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of all sequences together, 0 without any (Li et al. 2016)."""
    found = [gram for sequence in sequences for gram in _ngrams(sequence, n)]
    return len(set(found)) / len(found) if found else 0.0


def repetition(sequences: Sequence[Sequence[int]], n: int = 4) -> float:
    """Mean over the sequences of 1 - distinct n-grams / n-grams of the sequence (seq-rep-n, Welleck et al. 2020).

    Sequences shorter than n tokens do not count; 0 without any longer one.
    """
    shares = [1 - len(set(grams)) / len(grams) for sequence in sequences if (grams := _ngrams(sequence, n))]
    return sum(shares) / len(shares) if shares else 0.0


def agreement(first: Sequence[int], second: Sequence[int]) -> float:
    """Share of positions at which two sequences of one length hold the same token. Raises ValueError."""
    if len(first) != len(second) or not first:
        raise ValueError(f"sequences of {len(first)} and {len(second)} tokens")
    return sum(one == other for one, other in zip(first, second, strict=True)) / len(first)


def parts(sequence: Sequence[int], count: int) -> list[Sequence[int]]:
    """`sequence` cut into `count` parts of equal length; what is left over at the end goes."""
    length = len(sequence) // count
    return [sequence[index * length : (index + 1) * length] for index in range(count)]
