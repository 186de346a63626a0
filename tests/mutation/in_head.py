"""What is broken in the C++ of the fused head."""

from __future__ import annotations

from kinds import HEAD, native

IN_HEAD = (
    native(
        "head-label",
        "the label's logit counted among the others",
        "linear_cross_entropy/softmax.h",
        "z[(i / 16 * 2 + half) * 256 + i % 16 * 16 + lane] = nothing;",
        "static_cast<void>(i);",
        f"{HEAD}::test_many_chunks_and_groups",
        needs="avx512",
    ),
    native(
        "head-slope",
        "the softcap's derivative left out",
        "linear_cross_entropy/softmax.h",
        "if (kCap) share = _mm512_maskz_mul_ps(keep, share, slope);",
        "",
        f"{HEAD}::test_peaked_logits",
        needs="avx512",
    ),
    native(
        "head-reference",
        "sums of chunks added up although each is relative to its own largest logit",
        "linear_cross_entropy/finish.cpp",
        "sum[t] += in.sum[at] * std::exp(in.top[at] - top[t]);",
        "sum[t] += in.sum[at];",
        f"{HEAD}::test_many_chunks_and_groups",
        needs="avx512",
    ),
    native(
        "head-rescale",
        "what smaller logits gave not rescaled when a larger one comes",
        "linear_cross_entropy/softmax.h",
        "_mm512_store_ps(x, _mm512_mul_ps(_mm512_load_ps(x), factor));",
        "_mm512_store_ps(x, _mm512_load_ps(x));",
        f"{HEAD}::test_reference_logit_follows_the_largest",
        needs="avx512",
    ),
    native(
        "head-second-term",
        "shares of the softmax cut to one bfloat16 term where two are needed",
        "linear_cross_entropy/softmax.h",
        "if (!kRounded && exceeds(coarse, _mm512_mul_ps(whole, _mm512_set1_ps(0x1p-14f)))) return 2;",
        "if (!kRounded && exceeds(coarse, _mm512_mul_ps(whole, _mm512_set1_ps(0x1p-14f)))) return 1;",
        f"{HEAD}::test_many_chunks_and_groups",
        f"{HEAD}::test_peaked_logits",
        needs="avx512",
    ),
)
