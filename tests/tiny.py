"""A tiny random Llama with its tokenizer as a Hugging Face folder, and small corpora for it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from toy_tokenizers import CHATML, toy_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

WORDS = [
    "the",
    "answer",
    "is",
    "a",
    "short",
    "summary",
    "of",
    "numbers",
    "and",
    "capitals",
    "thank",
    "you",
    "so",
    "long",
    "friend",
    "what",
    "can",
    "it",
    "be",
]


def save_tiny(folder: Path, *, broken: bool = False, seed: int = 0) -> Path:
    """Save the model, with a NaN among its weights if it is to be broken."""
    tokenizer = toy_tokenizer(CHATML, eos="<|im_end|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    if broken:
        with torch.no_grad():
            model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = float("nan")
    model.save_pretrained(folder)
    return folder


def row(number: int) -> dict[str, Any]:
    """A chat row whose length and words depend on its number."""
    said = [WORDS[(number * 7 + i * (number % 5 + 1)) % len(WORDS)] for i in range(3 + number * 5 % 17)]
    return {
        "id": f"r{number}",
        "messages": [
            {"role": "user", "content": f"Question {number}: {' '.join(said[::-1])}?"},
            {"role": "assistant", "content": " ".join(said) + "."},
        ],
    }


def lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows as JSONL."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def corpus(path: str | Path, count: int) -> Path:
    """Write a corpus of rows that can all be scored."""
    Path(path).write_bytes(lines(row(number) for number in range(count)))
    return Path(path)


BAD_LINES: dict[str, bytes] = {
    "bad_json": b'{"messages": [',
    "bad_utf8": b'{"prompt": "\xff\xfe", "response": "x"}',
    "bad_row": b'["not", "an", "object"]',
    "unknown_role": b'{"messages": [{"role": "martian", "content": "x"}, {"role": "assistant", "content": "y"}]}',
    "no_response": b'{"messages": [{"role": "user", "content": "x"}]}',
    "too_large": b'{"prompt": "x", "response": "' + b"y" * 5000 + b'"}',
}
"""One line for each way a row can be unusable; the last one where the limit is below 5000 bytes."""
