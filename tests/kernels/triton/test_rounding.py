"""Why `product` sums block by block: a model of how the matrix units round, at the depths that models have.

The units add products to a running sum after cutting each off at the weight of the sum's last bit, or a few bits below
it on newer ones, and cut the sum off again: always towards zero. On terms of one sign these errors add up.
"""

from __future__ import annotations

import numpy as np
import pytest

BOUND = 8 * 2.0**-23
STEP = 16
"""Products that one instruction adds at once."""


def cut(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Cut off what lies below `weight`."""
    return np.trunc(x / weight) * weight


def last_bit(x: np.ndarray) -> np.ndarray:
    """Weight of a float32's last bit."""
    size = np.abs(x)
    return 2.0 ** (np.floor(np.log2(np.where(size > 0, size, 1.0))) - 23)


def add(total: np.ndarray, products: np.ndarray, extra: int) -> np.ndarray:
    """One instruction: the largest term says where all are cut off, `extra` bits below a float32's last."""
    terms = np.concatenate([total[:, None], products], axis=1)
    weight = last_bit(np.abs(terms).max(axis=1)) / 2.0**extra
    out = cut(terms, weight[:, None]).sum(axis=1)
    return cut(out, last_bit(out))


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Round to bfloat16, ties to even, kept as float32."""
    bits = x.astype(np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return bits.astype(np.uint32).view(np.float32)


def dot(a: np.ndarray, q: np.ndarray, block: int, extra: int) -> np.ndarray:
    """Sum a (bfloat16) times q (float32, in three terms, smallest first), a block of the depth at a time."""
    terms, rest = [], q
    for _ in range(3):
        terms.append(bfloat16(rest))
        rest = (rest - terms[-1]).astype(np.float32)
    assert not rest.any()
    total = np.zeros(len(a), np.float32)
    for start in range(0, a.shape[1], block):
        part = np.zeros(len(a))
        for term in reversed(terms):
            for k in range(start, start + block, STEP):
                part = add(part, a[:, k : k + STEP].astype(float) * term[k : k + STEP].astype(float), extra)
        total += part.astype(np.float32)
    return total


def error(block: int, extra: int) -> float:
    """The largest error of 32 sums of 4096 positive terms, as a part of the bound."""
    generator = np.random.default_rng(0)
    a, q = bfloat16(generator.random((32, 4096))), generator.random(4096).astype(np.float32)
    truth = a.astype(float) @ q.astype(float)
    return float((np.abs(dot(a, q, block, extra) - truth) / truth).max() / BOUND)


@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_blocks_as_they_are_used_stay_inside_the_bound(block: int, extra: int) -> None:
    assert error(block, extra) < 0.6


def test_one_running_sum_does_not() -> None:
    assert error(4096, 2) > 5
