from __future__ import annotations

import json
import math

import pytest
import torch
from tests.pipeline import tiny
from torch import nn

from saap.core.errors import EvaluationError
from saap.data.texts import answer_turns
from saap.evaluation.chat import chat_perplexity, check_conversations
from saap.evaluation.generation import (
    Prompt,
    Written,
    check_prompts,
    cloze,
    continuation,
    generation_figures,
    read_prompts,
    token_agreement,
    write,
)

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Counting(nn.Module):
    """Gives the successor of each token (modulo 320) probability 1/2, the others share the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids):
        likely = nn.functional.one_hot((input_ids + 1) % tiny.VOCABULARY, tiny.VOCABULARY).double()
        return likely * math.log(tiny.VOCABULARY - 1)


def test_continuations_are_scored_after_their_context() -> None:
    losses, likeliest = continuation(Counting(), [5, 6], [7, 8, 100])
    assert losses.tolist() == pytest.approx([math.log(2), math.log(2), math.log(2 * 319)], rel=1e-5)
    assert likeliest == [7, 8, 9]
    with pytest.raises(EvaluationError, match="without tokens"):
        continuation(Counting(), [], [1])


def test_greedy_text_repeats_itself_and_the_seed_decides_the_sampled_one() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    prompts = ["The house", "A river"]
    first = write(model, tokenizer, prompts, tokens=8, sampled=True, seed=1)
    assert first == write(model, tokenizer, prompts, tokens=8, sampled=True, seed=1)
    assert first != write(model, tokenizer, prompts, tokens=8, sampled=True, seed=2)
    greedy = write(model, tokenizer, prompts, tokens=8, sampled=False)
    assert greedy == write(model, tokenizer, prompts, tokens=8, sampled=False)
    assert all(1 <= len(one.ids) <= 8 for one in greedy)
    assert token_agreement(model, greedy, tokenizer) == 1.0
    figures = generation_figures(greedy, model, tokenizer)
    assert figures.dense_perplexity is not None
    assert figures.dense_perplexity >= 1
    assert len(figures.repetition_by_quarter) == 4
    assert generation_figures(greedy, None, tokenizer).dense_perplexity is None


def test_the_generation_configuration_does_not_change_the_text() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    prompts = ["The house", "A river"]
    plain = [write(model, tokenizer, prompts, tokens=8, sampled=sampled) for sampled in (False, True)]
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.suppress_tokens = [plain[0][0].ids[0]]
    assert [write(model, tokenizer, prompts, tokens=8, sampled=sampled) for sampled in (False, True)] == plain
    assert model.generation_config.repetition_penalty == 5.0


def test_every_end_token_of_the_model_ends_the_text() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    (plain,) = write(model, tokenizer, ["The house"], tokens=8, sampled=True)
    end = next(token for token in plain.ids[1:] if token != plain.ids[0])
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    (ended,) = write(model, tokenizer, ["The house"], tokens=8, sampled=True)
    assert ended.ids == plain.ids[: plain.ids.index(end)]


def test_a_text_that_falls_apart_is_seen_by_quarter() -> None:
    tokenizer = tiny.tokenizer()
    last = tokenizer("The house")["input_ids"][-1]
    likely = [(last + step) % tiny.VOCABULARY for step in range(1, 10)]
    torn = Written(prompt="The house", text="", ids=(*likely, *[likely[-1]] * 3))
    figures = generation_figures([torn], Counting(), tokenizer)
    assert figures.dense_perplexity_by_quarter == pytest.approx((2, 2, 2, 2 * 319), rel=1e-4)
    assert figures.dense_perplexity == pytest.approx(2 * 319 ** (3 / 12), rel=1e-4)
    assert figures.tokens == 12


def test_quarters_leave_out_what_is_left_over() -> None:
    tokenizer = tiny.tokenizer()
    last = tokenizer("The house")["input_ids"][-1]
    likely = [(last + step) % tiny.VOCABULARY for step in range(1, 13)]
    figures = generation_figures([Written(prompt="The house", text="", ids=(*likely, 5, 5))], Counting(), tokenizer)
    assert figures.dense_perplexity_by_quarter == pytest.approx((2, 2, 2, 2), rel=1e-4)
    assert figures.dense_perplexity is not None
    assert figures.dense_perplexity > 2


def test_cloze_counts_the_answers_that_the_model_would_give() -> None:
    tokenizer = tiny.tokenizer()
    right = tokenizer.decode([(tokenizer("ab")["input_ids"][-1] + 1) % tiny.VOCABULARY]).strip()
    prompts = [Prompt(prompt="ab", answer=right), Prompt(prompt="ab", answer="zz"), Prompt(prompt="open")]
    found = cloze(Counting(), tokenizer, prompts)
    assert found is not None
    assert found.prompts == 2
    expected = [int(continuation(Counting(), tokenizer("ab")["input_ids"], t)[1] == t)
                for t in (tokenizer(f" {right}")["input_ids"], tokenizer(" zz")["input_ids"])]  # fmt: skip
    assert list(found.correct) == expected
    assert cloze(Counting(), tokenizer, prompts[2:]) is None


def test_a_prompt_without_tokens_and_logits_that_are_not_finite_are_one_sentence() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    with pytest.raises(EvaluationError, match="no tokens"):
        check_prompts(model, tokenizer, [Prompt(prompt="")], 8)
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="not finite"):
        write(model, tokenizer, ["The house"], tokens=4, sampled=True)


def test_bundled_prompts_are_open_ones_and_facts() -> None:
    prompts = read_prompts("bundled")
    assert sum(prompt.answer is None for prompt in prompts) >= 10
    assert sum(prompt.answer is not None for prompt in prompts) >= 30


def test_prompt_files(tmp_path) -> None:
    lines = tmp_path / "p.txt"
    lines.write_text("One\n\nTwo\n")
    assert [prompt.prompt for prompt in read_prompts(lines)] == ["One", "Two"]
    rows = tmp_path / "p.jsonl"
    rows.write_text('{"prompt": "One"}\n{"answer": "x"}\n')
    with pytest.raises(EvaluationError, match=r"p.jsonl, line 2"):
        read_prompts(rows)
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


def conversation() -> list[dict[str, str]]:
    return [
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": "c d"},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "f"},
    ]


def test_only_the_answers_of_a_conversation_are_scored() -> None:
    tokenizer, model = tiny.tokenizer(), tiny.model()
    tokenizer.chat_template = TEMPLATE
    turns = list(answer_turns("a conversation", conversation(), tokenizer, error=EvaluationError))
    assert turns == [
        ("[user]a b[end][assistant]", "c d[end]"),
        ("[user]a b[end][assistant]c d[end][user]e[end][assistant]", "f[end]"),
    ]
    found = chat_perplexity(model, tokenizer, {"a.jsonl, line 1": conversation()})
    spans = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in turn] for turn in turns]
    losses = torch.cat([continuation(model, context, answer)[0] for context, answer in spans])
    assert found.nll == pytest.approx(float(losses.mean()))
    assert (found.turns, found.tokens) == (2, len(losses))


def test_conversations_that_cannot_be_scored_are_refused() -> None:
    tokenizer, model = tiny.tokenizer(), tiny.model()
    with pytest.raises(EvaluationError, match="no chat template"):
        chat_perplexity(model, tokenizer, {"a.jsonl, line 1": conversation()})
    tokenizer.chat_template = TEMPLATE
    for without in (conversation()[:1], conversation()[1:2]):  # no answer, and one to nothing
        with pytest.raises(EvaluationError, match="line 1 has no turn of an assistant after another message"):
            check_conversations(tokenizer, {"a.jsonl, line 1": without})
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(EvaluationError, match="line 1 does not fit"):
        chat_perplexity(model, tokenizer, {"a.jsonl, line 1": conversation()})
    tokenizer.chat_template = "{{ messages | length }}" + json.dumps("x")
    with pytest.raises(EvaluationError, match="generation prompt"):
        chat_perplexity(model, tokenizer, {"a.jsonl, line 1": conversation()})
