"""Packing: every row once, within the budget, with little padding, and always the same way."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizers import CHATML, trained_tokenizer, untagged

from gradshield_fast.chat import ChatEncoder, Encoded
from gradshield_fast.corpus import read_corpus
from gradshield_fast.errors import InputError
from gradshield_fast.packing import Batch, pack


def row(length: int, first: int = 1) -> Encoded:
    ids = list(range(first, first + length))
    labels = [-100] * (length // 2) + ids[length // 2 :]
    return Encoded(ids, labels, length - length // 2, "ok")


def padding(batches: list[Batch]) -> float:
    return sum(b.pad_fraction * b.input_ids.size for b in batches) / sum(b.input_ids.size for b in batches)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), max_size=60),
    batch_tokens=st.integers(1, 200),
    window=st.integers(1, 80),
    max_rows=st.none() | st.integers(1, 5),
    padded=st.booleans(),
)
def test_every_row_is_packed_once_within_the_budget(
    lengths: list[int], batch_tokens: int, window: int, max_rows: int | None, padded: bool
) -> None:
    items = [(1000 - 3 * n, row(length, first=100 * n)) for n, length in enumerate(lengths)]
    options = {"batch_tokens": batch_tokens, "window": window, "max_rows": max_rows}
    batches = list(pack(iter(items), pad_id=7, padded=padded, **options))
    found = {}
    for batch in batches:
        rows, tokens = batch.input_ids.shape
        assert (rows * tokens if padded else int(batch.cu_seqlens[-1])) <= batch_tokens or rows == 1
        assert max_rows is None or rows <= max_rows
        assert batch.labels.shape == batch.attention_mask.shape == (rows, tokens)
        assert {a.dtype for a in (batch.input_ids, batch.labels, batch.attention_mask, batch.positions)} == {
            np.dtype("int64")
        }
        assert batch.cu_seqlens.dtype == np.int32
        assert batch.cu_seqlens[0] == 0
        for n, position in enumerate(batch.positions.tolist()):
            length = int(batch.cu_seqlens[n + 1] - batch.cu_seqlens[n])
            assert batch.attention_mask[n].tolist() == [1] * length + [0] * (tokens - length)
            assert (batch.input_ids[n, length:] == 7).all()
            assert (batch.labels[n, length:] == -100).all()
            assert position not in found
            found[position] = (batch.input_ids[n, :length].tolist(), batch.labels[n, :length].tolist())
        assert batch.pad_fraction == pytest.approx(1 - batch.attention_mask.mean())
    assert found == {position: (r.input_ids, r.labels) for position, r in items}


def test_the_same_rows_give_the_same_batches_and_the_longest_come_first() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, size=500).tolist()
    items = [(n, row(length)) for n, length in enumerate(lengths)]
    one, two = (list(pack(items, batch_tokens=1024)) for _ in range(2))
    assert [b.positions.tolist() for b in one] == [b.positions.tolist() for b in two]
    assert one[0].input_ids.shape[1] == max(lengths)
    widths = [b.input_ids.shape[1] for b in one]
    assert widths == sorted(widths, reverse=True)


def test_rows_of_one_length_fill_the_budget_without_padding() -> None:
    batches = list(pack(((n, row(16)) for n in range(64)), batch_tokens=256))
    assert [b.input_ids.shape for b in batches] == [(16, 16)] * 4
    assert padding(batches) == 0


def test_without_padding_a_budget_is_filled_by_rows_of_any_length() -> None:
    items = [(n, row(length)) for n, length in enumerate([50, 30, 10, 10, 40, 60])]
    batches = list(pack(iter(items), batch_tokens=100, padded=False))
    assert [np.diff(batch.cu_seqlens).tolist() for batch in batches] == [[60], [50, 40], [30, 10, 10]]


def test_a_longer_row_has_a_batch_of_its_own() -> None:
    batches = list(pack([(0, row(10)), (1, row(500)), (2, row(10))], batch_tokens=64))
    assert [(b.input_ids.shape, b.positions.tolist()) for b in batches] == [((1, 500), [1]), ((2, 10), [0, 2])]


def test_rows_are_read_a_window_at_a_time() -> None:
    read = []

    def items():
        for n in range(100):
            read.append(n)
            yield n, row(5)

    next(pack(items(), batch_tokens=20, window=10))
    assert len(read) == 10


def test_nothing_gives_nothing() -> None:
    assert list(pack([], batch_tokens=8)) == []


@pytest.mark.parametrize("option", ["batch_tokens", "window", "max_rows"])
def test_options_below_one_are_errors(option: str) -> None:
    with pytest.raises(InputError, match=rf"{option} must be at least 1: got 0"):
        list(pack([], **{"batch_tokens": 8, option: 0}))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("bad", [Encoded([], [], 0, "template_error"), Encoded([1, 2], [-100], 0, "ok")])
def test_a_row_without_tokens_is_named(bad: Encoded) -> None:
    with pytest.raises(InputError, match=rf"row 17 .*status {bad.status}"):
        list(pack([(3, row(4)), (17, bad)], batch_tokens=8))


@pytest.fixture(scope="module")
def real_rows() -> list[tuple[int, Encoded]]:
    if "GRADSHIELD_SHARED_DATA" not in os.environ:
        pytest.skip("GRADSHIELD_SHARED_DATA names no data folder")
    folder = Path(os.environ["GRADSHIELD_SHARED_DATA"])
    files = [folder / "gsm8k_train_2k.jsonl", *sorted(folder.glob("*_1k.jsonl"))]
    chats = [r.messages for path in files for r in read_corpus(path) if r.messages is not None]
    # No real tokenizer is at hand in a test: one of 5,000 tokens trained on these rows comes within 5 % of SmolLM2's
    # count of tokens on them.
    texts = (m["content"] for chat in chats for m in chat)
    encoder = ChatEncoder(trained_tokenizer(texts, 5000, untagged(CHATML)))
    return list(enumerate(map(encoder.encode, chats)))


@pytest.mark.parametrize("order", ["file", "shuffled"])
@pytest.mark.parametrize("budget", [2048, 4096, 8192])
def test_padding_of_real_rows_stays_under_five_percent(
    real_rows: list[tuple[int, Encoded]], order: str, budget: int
) -> None:
    items = list(real_rows)
    assert len(items) > 7000
    if order == "shuffled":
        random.Random(0).shuffle(items)
    batches = list(pack(items, batch_tokens=budget, window=2048))
    share = padding(batches)
    print(f"{order}, {budget} tokens: {len(batches)} batches, {share:.2%} padding")
    assert share < 0.05
