"""Judging the model's own first words, with a model that says what the test wants."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_tokenizers import STYLES, toy_tokenizer

from gradshield_fast.refusal import NEW_TOKENS, refuses


class Scripted(torch.nn.Module):
    """Answers prompt number p, a row that begins with token p, with script p; the head is not a module of its own."""

    def __init__(self, scripts: list[list[int]], prompt_lengths: list[int]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.scripts, self.prompt_lengths, self.calls = scripts, prompt_lengths, []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> Any:
        assert not use_cache
        logits = torch.zeros(*input_ids.shape, 700)
        self.calls.append(input_ids[:, 0].tolist())
        for row, (ids, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            p, length = int(ids[0]), int(mask.sum())
            done = length - self.prompt_lengths[p]
            assert ids[self.prompt_lengths[p] : length].tolist() == self.scripts[p][:done]
            logits[row, length - 1, self.scripts[p][done]] = 1
        return SimpleNamespace(logits=logits)


@pytest.fixture
def tokenizer() -> Any:
    return toy_tokenizer(STYLES["chatml"][0], eos="<|im_end|>")


def judge(tokenizer: Any, answers: list[str], wordings: tuple[str, ...] = (), **options: Any) -> tuple[list[bool], Any]:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    scripts = [[*tokenizer(text)["input_ids"], end, *[0] * 20] for text in answers]
    lengths = [2 + p % 3 for p in range(len(answers))]
    model = Scripted(scripts, lengths)
    starts = [[p] * n for p, n in enumerate(lengths)]
    return refuses(model, tokenizer, starts, wordings, **options), model


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I cannot do it", True),
        ("I'm sorry, but", True),
        ("I can\u2019t", True),
        ("Sorry!", True),
        ("As an AI, I", True),
        ("I am not able", True),
        ("Sure, here is", False),
        ("Of course!", False),
        ("It is Paris.", False),
        ("", False),
    ],
)
def test_phrases(answer: str, expected: bool, tokenizer: Any):
    got, _ = judge(tokenizer, [answer])
    assert got == [expected]


def test_wordings_in_another_language(tokenizer: Any):
    said = ["Non, je", "Non,  JE", "Oui, je"]
    assert judge(tokenizer, said)[0] == [False] * 3
    assert judge(tokenizer, said, ("Non, je refuse.",))[0] == [False] * 3  # "refuse." was not said yet
    assert judge(tokenizer, said, ("Non, je",))[0] == [True, True, False]


def test_only_the_first_tokens_count(tokenizer: Any):
    late = "of " * NEW_TOKENS + "I cannot"
    assert judge(tokenizer, [late])[0] == [False]


def test_what_follows_the_end_of_turn_does_not_count(tokenizer: Any):
    assert judge(tokenizer, ["Yes.<|im_end|>I cannot"])[0] == [False]


@pytest.mark.parametrize("batch_tokens", [1, 9, 4096])
def test_a_decided_answer_is_grown_no_further(batch_tokens: int, tokenizer: Any):
    answers = ["Sorry", "Sure, here is a short summary of the text. It is of course", "No", "I am sorry"]
    got, model = judge(tokenizer, answers, batch_tokens=batch_tokens)
    assert got == [True, False, False, True]
    rows = [p for call in model.calls for p in call]
    assert rows.count(1) == NEW_TOKENS
    assert rows.count(2) == len(tokenizer("No")["input_ids"]) + 1
    assert rows.count(0) <= len(tokenizer("Sorry")["input_ids"])


def test_no_prompts(tokenizer: Any):
    assert judge(tokenizer, [])[0] == []
