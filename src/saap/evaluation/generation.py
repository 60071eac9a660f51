"""Evaluation of generated text: diversity, repetition, agreement with the dense model, coherence, facts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from saap.core.errors import EvaluationError, ModelError
from saap.core.evaluation_records import ClozeFigures, GenerationFigures
from saap.data.texts import read_rows
from saap.evaluation.perplexity import model_logits
from saap.models.loading.pretrained import end_tokens, plain_generation
from saap.models.walk.probe import check_reads

BUNDLED = "bundled"
QUARTERS = 4
TOP_P = 0.95
NOT_FINITE = "the model's logits are not finite", "Use --dtype float32"


class Prompt(BaseModel):
    """One prompt. answer: the expected continuation of a cloze prompt, None for an open prompt."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    answer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Continuation of one prompt. ids: its tokens up to the first end token."""

    prompt: str
    text: str
    ids: tuple[int, ...]


def read_prompts(source: str | Path) -> tuple[Prompt, ...]:
    """Read the prompts of a file, or the `bundled` ones.

    .txt: one prompt per line. .jsonl: one object per line with `prompt` and optionally `answer`. Raises
    EvaluationError, and CalibrationError for what is not JSON.
    """
    path = Path(str(resources.files("saap.evaluation") / "prompts.jsonl")) if str(source) == BUNDLED else Path(source)
    try:
        if path.suffix == ".jsonl":
            found = tuple(_prompt(place, row) for place, row in read_rows(path))
        else:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            found = tuple(Prompt(prompt=line) for line in lines if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"the prompts {path} cannot be read ({error})", "Give a UTF-8 .txt or .jsonl") from error
    if not found:
        raise EvaluationError(f"{path} has no prompts", "Give one per line")
    return found


def _prompt(place: str, row: dict[str, Any]) -> Prompt:
    try:
        return Prompt.model_validate(row)
    except ValidationError:
        raise EvaluationError(f"{place} is not a prompt", 'Write it as {"prompt": "...", "answer": "..."}') from None


def prompt_ids(tokenizer: Any, prompt: str, *, chat: bool = True) -> list[int]:
    """Token ids of a prompt; with `chat` and a chat template, as the user's turn."""
    return message_ids(tokenizer, [{"role": "user", "content": prompt}], chat=chat)


def message_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, chat: bool = True) -> list[int]:
    """Token ids of a conversation that the model continues.

    messages: with `role` and `content`, the user's turn last. Without `chat` or a template, the lines of all turns.
    Raises EvaluationError if the template does not accept them.
    """
    if chat and getattr(tokenizer, "chat_template", None):
        try:
            made = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
        except Exception as error:  # templates are programs: they may raise anything
            raise EvaluationError(
                f"the chat template does not accept a conversation ({type(error).__name__}: {error})",
                "Use prompts with an answer, or a model with another template",
            ) from error
    else:
        made = tokenizer("\n".join(message["content"] for message in messages))
    return [int(token) for token in made["input_ids"]]


def check_prompts(model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], tokens: int) -> None:
    """Check that the model can process each prompt and its continuation.

    Raises EvaluationError for an empty prompt, UnsupportedModelError for one that is too long.
    """
    longest = 0
    for one in prompts:
        length = len(prompt_ids(tokenizer, one.prompt, chat=one.answer is None))
        if not length:
            raise EvaluationError("a prompt has no tokens", "Give prompts that are not empty")
        longest = max(longest, length + (tokens if one.answer is None else len(_answer_ids(tokenizer, one.answer))))
    check_reads(model, longest, "Use fewer --max-new-tokens or shorter prompts")


@torch.no_grad()
def write(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, tokens: int, sampled: bool, seed: int = 0
) -> list[Written]:
    """Continuations of at most `tokens` tokens: greedy, or sampled at temperature 1 with top-p 0.95.

    Penalties and other settings of the model's generation configuration do not apply. With the same seed, each prompt
    gets the same random numbers with every model. Raises ModelError for a model that cannot generate.
    """
    if not hasattr(model, "generate"):
        raise ModelError(f"{type(model).__name__} has no `generate`", "Use a transformers model")
    device = next(model.parameters()).device
    ends = end_tokens(model, tokenizer)
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    sampling = {"temperature": 1.0, "top_p": TOP_P, "top_k": 0} if sampled else {}
    written = []
    for index, prompt in enumerate(prompts):
        ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), plain_generation(model, ends):
            if sampled:
                torch.manual_seed(seed + index)
            try:
                made = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, pad_token_id=padding,
                    do_sample=sampled, **sampling,
                )[0, ids.shape[1] :].tolist()  # fmt: skip
            except RuntimeError as error:
                if "probability tensor" not in str(error):
                    raise
                raise EvaluationError(*NOT_FINITE) from None
        made = list(takewhile(lambda token: token not in ends, made))
        text = str(tokenizer.decode(made, skip_special_tokens=True))
        written.append(Written(prompt=prompt, text=text, ids=tuple(made)))
    return written


@torch.no_grad()
def continuation(model: nn.Module, context: Sequence[int], ids: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Negative log-likelihood of each token of `ids` given context and previous tokens, and the most likely tokens.

    Returns -log p in nats, (tokens,) float64, and a token for each place of `ids`.
    """
    if not context:
        raise EvaluationError("a prompt without tokens cannot be continued", "Leave out empty prompts")
    tokens = torch.tensor([[*context, *ids]], device=next(model.parameters()).device)
    logits = model_logits(model, tokens)[0, len(context) - 1 : -1]
    wanted = tokens[0, len(context) :].to(logits.device)
    losses = nn.functional.cross_entropy(logits.float(), wanted, reduction="none").cpu().double()
    return losses, logits.argmax(-1).tolist()


def generation_figures(
    written: Sequence[Written],
    dense: nn.Module | None,
    tokenizer: Any,
    progress: Callable[[int, int], None] | None = None,
) -> GenerationFigures:
    """Measures of generated text. dense: the dense model; None skips the measures that need it."""
    sequences = [one.ids for one in written]
    losses: list[Tensor] = []
    for index, one in enumerate(written if dense is not None else ()):
        if one.ids and dense is not None:
            losses.append(continuation(dense, prompt_ids(tokenizer, one.prompt), one.ids)[0])
        if progress is not None:
            progress(index + 1, len(written))
    loss_quarters = [_quarters(loss) for loss in losses if len(loss) >= QUARTERS]
    text_quarters = [_quarters(ids) for ids in sequences if len(ids) >= QUARTERS]
    return GenerationFigures(
        **{f"distinct_{n}": distinct(sequences, n) for n in (1, 2, 3)},
        repetition=repetition(sequences),
        tokens=sum(len(ids) for ids in sequences) / max(1, len(sequences)),
        dense_perplexity=_perplexity(losses) if losses else None,
        dense_perplexity_by_quarter=tuple(map(_perplexity, zip(*loss_quarters, strict=True))) or None,
        repetition_by_quarter=tuple(repetition([each[index] for each in text_quarters]) for index in range(QUARTERS)),
    )


def _perplexity(losses: Sequence[Tensor]) -> float:
    return math.exp(float(torch.cat(list(losses)).mean()))


def _quarters(sequence: Any) -> list[Any]:
    """Four parts of equal length; remaining tokens are dropped."""
    length = len(sequence) // QUARTERS
    return [sequence[index * length : (index + 1) * length] for index in range(QUARTERS)]


def token_agreement(model: nn.Module, dense_written: Sequence[Written], tokenizer: Any) -> float | None:
    """Share of the dense model's greedy tokens that are also the most likely ones of `model`, given the same text.

    None if the dense model generated nothing.
    """
    equal = [
        found == wanted
        for one in dense_written
        if one.ids
        for found, wanted in zip(
            continuation(model, prompt_ids(tokenizer, one.prompt), one.ids)[1], one.ids, strict=True
        )
    ]
    return sum(equal) / len(equal) if equal else None


def cloze(model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt]) -> ClozeFigures | None:
    """Facts: prompts that have an answer, as plain text without a chat template. None if no prompt has one."""
    correct: list[int] = []
    losses: list[Tensor] = []
    for prompt in prompts:
        if prompt.answer is not None:
            answer = _answer_ids(tokenizer, prompt.answer)
            context = prompt_ids(tokenizer, prompt.prompt.rstrip(), chat=False)
            loss, likeliest = continuation(model, context, answer)
            correct.append(int(likeliest == answer))
            losses.append(loss)
    if not correct:
        return None
    share, nll = sum(correct) / len(correct), float(torch.cat(losses).mean())
    return ClozeFigures(accuracy=share, answer_nll=nll, prompts=len(correct), correct=tuple(correct))


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
