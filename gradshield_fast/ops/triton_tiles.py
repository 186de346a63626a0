"""Device functions that the Triton kernels share: products of tiles whose every term is exact."""

from __future__ import annotations

from gradshield_fast.ops.triton_support import jit, tl


@jit()
def split(b_x):
    """Split a tile into bfloat16 terms, largest first: x = x0 + x1 + x2 exactly; one term holds bfloat16, two float16.

    A float32 has 24 significant bits and each term takes 8, so the remainder of each rounding is exact. Terms of a
    value below 2^-110 can fall below bfloat16's smallest number and are lost; an infinite value gives NaN.
    """
    b_0 = b_x.to(tl.bfloat16)
    b_rest = b_x.to(tl.float32) - b_0.to(tl.float32)
    b_1 = b_rest.to(tl.bfloat16)
    b_2 = (b_rest - b_1.to(tl.float32)).to(tl.bfloat16)
    return b_0, b_1, b_2


@jit()
def exact_dot(b_x, b_y, INTERPRETED: tl.constexpr):
    """b_x [M, K] times b_y [K, N] in float32 on the matrix units, whose inputs must have one 16-bit type.

    Equal 16-bit types multiply as they are: the product of two is exact in float32. Otherwise both sides are split
    into bfloat16 terms and all products of terms are summed. The units round their running sum towards zero, so the
    smallest products come first, while that sum is small. Two float32 tiles are multiplied by fused multiply-adds.
    The interpreter multiplies bfloat16 by its bits: there every term is widened first.
    """
    if b_x.dtype == tl.float32 and b_y.dtype == tl.float32:
        b_p = tl.dot(b_x, b_y, input_precision="ieee", max_num_imprecise_acc=1)
    elif b_x.dtype == b_y.dtype:
        b_p = _dot(b_x, b_y, tl.zeros([b_x.shape[0], b_y.shape[1]], tl.float32), INTERPRETED)
    else:
        X: tl.constexpr = tl.constexpr(3 if b_x.dtype == tl.float32 else (2 if b_x.dtype == tl.float16 else 1))
        Y: tl.constexpr = tl.constexpr(3 if b_y.dtype == tl.float32 else (2 if b_y.dtype == tl.float16 else 1))
        b_x0, b_x1, b_x2 = split(b_x)
        b_y0, b_y1, b_y2 = split(b_y)
        b_p = tl.zeros([b_x.shape[0], b_y.shape[1]], tl.float32)
        if X == 3 and Y == 2:
            b_p = _dot(b_x2, b_y1, b_p, INTERPRETED)
        if X == 2 and Y == 3:
            b_p = _dot(b_x1, b_y2, b_p, INTERPRETED)
        if X == 3:
            b_p = _dot(b_x2, b_y0, b_p, INTERPRETED)
        if Y == 3:
            b_p = _dot(b_x0, b_y2, b_p, INTERPRETED)
        if X >= 2 and Y >= 2:
            b_p = _dot(b_x1, b_y1, b_p, INTERPRETED)
        if X >= 2:
            b_p = _dot(b_x1, b_y0, b_p, INTERPRETED)
        if Y >= 2:
            b_p = _dot(b_x0, b_y1, b_p, INTERPRETED)
        b_p = _dot(b_x0, b_y0, b_p, INTERPRETED)
    return b_p


@jit()
def _dot(b_x, b_y, b_p, INTERPRETED: tl.constexpr):
    """b_p + b_x b_y for two tiles of one 16-bit type, kept apart from any sum that the caller adds it to."""
    if INTERPRETED:
        b_p += tl.dot(b_x.to(tl.float32), b_y.to(tl.float32), input_precision="ieee")
    else:
        b_p = tl.dot(b_x, b_y, b_p, max_num_imprecise_acc=1)
    return b_p


@jit()
def product(
    x_p,
    y_p,
    m_x,
    m_y,
    first,
    last,
    limit,
    stride_x,
    stride_y,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """b[m, n] = sum_{i = first}^{last - 1} x[m, i] y[n, i], [BLOCK_M, BLOCK_N].

    x_p [BLOCK_M] and y_p [BLOCK_N] point at i = 0 of each row, m_x and m_y say which rows exist, and the strides step
    along i. Each block of i is summed on its own and then added once, rounded to nearest: on the matrix units a sum
    of thousands of terms would lose a bit at each step, always towards zero.
    `limit` masks i and is last or more; a block must not reach past `last` into entries that another program takes.
    """
    o_i = tl.arange(0, BLOCK_I)
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(first, last, BLOCK_I):
        m_i = i + o_i < limit
        i_i = (i + o_i).to(tl.int64)
        b_x = tl.load(x_p[:, None] + i_i[None, :] * stride_x, mask=m_x[:, None] & m_i[None, :], other=0.0)
        b_y = tl.load(y_p[None, :] + i_i[:, None] * stride_y, mask=m_y[None, :] & m_i[:, None], other=0.0)
        b_sum += exact_dot(b_x, b_y, INTERPRETED)
    return b_sum


@jit()
def described_product(
    x,
    y,
    row_x,
    row_y,
    rows_x,
    rows_y,
    depth,
    stride_x,
    stride_y,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The same sum in the same order as `product` over the whole depth, its tiles copied by tensor descriptors.

    x [rows_x, depth] and y [rows_y, depth] have stride 1 along i, and the tiles begin at row_x and row_y; what lies
    outside of the matrices reads as zero. One thread asks for a tile, where pointers take every thread's registers.
    """
    x_d = tl.make_tensor_descriptor(x, [rows_x, depth], [stride_x, 1], [BLOCK_M, BLOCK_I])  # pyright: ignore[reportArgumentType]
    y_d = tl.make_tensor_descriptor(y, [rows_y, depth], [stride_y, 1], [BLOCK_N, BLOCK_I])  # pyright: ignore[reportArgumentType]
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(0, depth, BLOCK_I):
        b_x, b_y = x_d.load([row_x, i]), y_d.load([row_y, i])  # pyright: ignore[reportArgumentType]
        b_sum += exact_dot(b_x, b_y.T, INTERPRETED)
    return b_sum
