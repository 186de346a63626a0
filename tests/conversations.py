"""Turns of a conversation, and what their encoding learns."""

from __future__ import annotations

from typing import Any

from toy_tokenizers import STYLES, toy_tokenizer, untagged

from gradshield_fast.chat import IGNORE, ChatEncoder, Encoded

USER = {"role": "user", "content": "What is the capital of France?"}
PARIS = {"role": "assistant", "content": "It is Paris."}
THANKS = {"role": "user", "content": "Sure, thank you."}
BYE = {"role": "assistant", "content": "So long."}
SYSTEM = {"role": "system", "content": "Answer with a short summary."}


def turns(encoded: Encoded, tokenizer: Any) -> list[str]:
    """The text of each run of labelled tokens."""
    runs: list[list[int]] = []
    for t, label in enumerate(encoded.labels):
        assert label in (IGNORE, encoded.input_ids[t])
        if label != IGNORE:
            if t == 0 or encoded.labels[t - 1] == IGNORE:
                runs.append([])
            runs[-1].append(label)
    return [tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False) for run in runs]


def encode(style: str, messages: list[dict[str, str]], tagged: bool = False, **options: Any) -> tuple[Encoded, Any]:
    template, kinds = STYLES[style]
    tokenizer = toy_tokenizer(template if tagged else untagged(template), **kinds)
    return ChatEncoder(tokenizer, **options).encode(messages), tokenizer
