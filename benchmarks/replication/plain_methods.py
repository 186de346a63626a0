"""Removal methods that need no direction: words, and nearness of hidden states."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from context import BATCH_TOKENS, Context
from directions import anchor_rows

from gradshield_fast.batches import padded_batch
from gradshield_fast.chat import Encoded
from gradshield_fast.packing import pack

WORDS = re.compile(
    r"\b(abus|assault|attack|blackmail|bomb|breach|bully|child porn|crack|crime|crimin|cyber|deceiv|defam|destroy|"
    r"discriminat|drug|exploit|explosiv|extort|fake|firearm|forg|fraud|gun|hack|harass|harm|hate|hijack|identity theft|"
    r"illegal|illicit|incit|infect|kidnap|kill|launder|malicious|malware|manipulat|murder|phish|pirat|poison|racis|"
    r"ransom|rob|sabotage|scam|self-harm|sexis|shoplift|smuggl|spy|stalk|steal|stole|suicid|terroris|theft|threat|"
    r"torture|traffick|unauthori[sz]ed|violen|virus|weapon)",
    re.IGNORECASE,
)
"""Beginnings of words that a plain filter would look for."""


def keywords(context: Context) -> np.ndarray:
    """Count words of harm.

    Args:
        context: the cell.

    Returns:
        float64 [rows], words of harm in a row's user and assistant turns.
    """
    texts = [" ".join(m["content"] for m in row.messages if m["role"] != "system") for row in context.rows]
    return np.array([float(len(WORDS.findall(text))) for text in texts])


def last_states(model: Any, encoded: Sequence[Encoded]) -> np.ndarray:
    """Read off the last hidden state of each row at its last token.

    Args:
        model: the model.
        encoded: the rows.

    Returns:
        float64 [rows, hidden], of length 1.
    """
    states = np.zeros((len(encoded), model.config.hidden_size))
    for batch in pack(enumerate(encoded), batch_tokens=BATCH_TOKENS):
        padded = padded_batch(vars(batch), next(model.parameters()).device, None)
        with torch.no_grad():
            made = model.base_model(input_ids=padded.input_ids, attention_mask=padded.attention_mask)[0]
        last = padded.attention_mask.sum(1) - 1
        states[batch.positions] = made[torch.arange(padded.rows), last].double().cpu().numpy()
    return states / np.linalg.norm(states, axis=1, keepdims=True)


def hidden(context: Context) -> np.ndarray:
    """Compare a row's representation with those of harmful and of safe anchors, after arXiv 2404.01099.

    Args:
        context: the cell.

    Returns:
        float64 [rows], mean cosine with the harmful anchors less that with the safe ones.
    """

    def compute(encoded: list[Encoded]) -> np.ndarray:
        harmful, safe = (last_states(context.model, rows) for rows in anchor_rows(context.tokenizer, context.probes))
        return last_states(context.model, encoded) @ (harmful.mean(0) - safe.mean(0))[:, None]

    return context.table("hidden", compute)[:, 0]
