"""What is broken in the attention kernels."""

from __future__ import annotations

from kinds import ATTENTION, native

IN_ATTENTION = (
    native(
        "attention-diagonal",
        "queries see the later keys of their own block",
        "varlen_attention/scores.h",
        "return keys == queries || ",
        "return ",
        ATTENTION,
        needs="avx512",
    ),
    native(
        "attention-next",
        "a query sees the key behind its own",
        "varlen_attention/scores.h",
        "from = most(0, least(16, key - query))",
        "from = most(0, least(16, key - 1 - query))",
        ATTENTION,
        needs="avx512",
    ),
    native(
        "attention-border",
        "a row's last block goes on into the next row",
        "varlen_attention/tiles.h",
        "end - token < kBlock ? end - token : kBlock",
        "kBlock",
        ATTENTION,
        needs="avx512",
    ),
    native(
        "attention-rescale",
        "what earlier keys gave not rescaled when a larger score comes",
        "varlen_attention/forward.h",
        "      rescale(s.sums, steps, by);\n",
        "",
        ATTENTION,
        needs="avx512",
    ),
    native(
        "attention-mean",
        "the softmax's own derivative left out of the gradient",
        "varlen_attention/backward.h",
        "_mm512_sub_ps(dot, mean[half])",
        "_mm512_sub_ps(dot, _mm512_mul_ps(mean[half], _mm512_setzero_ps()))",
        ATTENTION,
        needs="avx512",
    ),
)
