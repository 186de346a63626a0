"""Examples as a front end gives them -> rows, and rows that come as tokens -> what the scorer takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradshield_fast.chat import IGNORE, Encoded
from gradshield_fast.errors import InputError


def failed(status: str, reason: str) -> Encoded:
    """Make the encoding of a row that cannot be scored.

    Args:
        status: reason code.
        reason: a sentence for a person.

    Returns:
        An encoding without tokens.
    """
    return Encoded([], [], 0, status, reason)


def rows_of(examples: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> list[Any]:
    """Take examples apart.

    Args:
        examples: a list of rows, or a batch of arrays {"input_ids", "labels", "attention_mask" (optional)}.

    Returns:
        One entry a row; what is wrong with a single one is not looked at here.

    Raises:
        InputError: it is neither of the two.
    """
    if isinstance(examples, Mapping):
        names = [name for name in ("input_ids", "labels", "attention_mask") if examples.get(name) is not None]
        if names[:2] != ["input_ids", "labels"]:
            raise InputError(f"a batch must have input_ids and labels, got {sorted(examples)}; or give a list of dicts")
        sizes = {name: len(examples[name]) for name in names}
        if len(set(sizes.values())) > 1:
            raise InputError(f"the arrays of a batch must have as many rows each, got {sizes}")
        return [{name: examples[name][i] for name in names} for i in range(sizes["input_ids"])]
    if isinstance(examples, str | bytes) or not isinstance(examples, Sequence):
        raise InputError(f"examples must be a list of dicts or a dict of arrays, got {type(examples).__name__}")
    return list(examples)


def tokenised(row: Mapping[str, Any], max_length: int | None) -> Encoded:
    """Check a row that comes as tokens, and take off its padding.

    Args:
        row: {"input_ids", "labels", "attention_mask" (optional)}, lists or one-dimensional arrays or tensors.
        max_length: bound on its tokens.

    Returns:
        The row's encoding; what is wrong with it is in the status.
    """
    columns: dict[str, NDArray[np.int64]] = {}
    for name in ("input_ids", "labels", "attention_mask"):
        if row.get(name) is None:
            if name != "attention_mask":
                return failed("bad_row", f"a row of tokens needs {name}; labels are -100 where there is no loss")
            continue
        values = _array(row[name])
        if values.ndim != 1 or (values.size and values.dtype.kind not in "iub"):
            return failed("bad_row", f"{name} must be a list of integers, got {values.dtype} of shape {values.shape}")
        columns[name] = values.astype(np.int64)
        if values.size != columns["input_ids"].size:
            return failed("bad_row", f"{name} has {values.size} entries, input_ids {columns['input_ids'].size}")
    ids, labels = columns["input_ids"], columns["labels"]
    if "attention_mask" in columns:
        real = np.flatnonzero(columns["attention_mask"])
        if real.size and real[-1] - real[0] + 1 != real.size:
            return failed("bad_row", "the attention mask has a hole: a row's tokens must be contiguous")
        if (np.delete(labels, real) != IGNORE).any():
            return failed("bad_row", "a label lies on padding, where it must be -100")
        ids, labels = ids[real], labels[real]
    if not ids.size:
        return failed("empty", "the row has no tokens")
    kept = ids.size if max_length is None else min(max_length, ids.size)
    total = int((labels[1:] != IGNORE).sum())
    labels = labels[:kept].copy()
    labels[0] = IGNORE  # nothing comes before the first token, so nothing predicts it
    count = int((labels != IGNORE).sum())
    if not count:
        if total:
            return failed("no_response_after_truncation", f"every label lies beyond the first {kept} tokens")
        return failed("no_response", "no token after the first has a label, so there is nothing to learn from")
    status, reason = ("truncated", f"cut to the first {kept} of {ids.size} tokens") if kept < ids.size else ("ok", "")
    return Encoded(ids[:kept].tolist(), labels.tolist(), count, status, reason)


def _array(value: Any) -> NDArray[Any]:
    """A list, array or tensor as an array; one that numpy cannot read becomes an array of objects."""
    value = value.detach().cpu() if hasattr(value, "detach") else value
    try:
        return np.asarray(value)
    except ValueError:  # rows of different lengths
        return np.asarray(list(value), dtype=object)
