"""What scoring a large corpus on a large model costs on paper: every term by its formula. Nothing here is measured.

python benchmarks/cost_model.py [--rows 1000000] [--tokens 300] [--response 150] [--gpus 8] > benchmarks/COST_MODEL.md
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

PEAK, BANDWIDTH = 989e12, 3.35e12
"""H100 SXM by its data sheet: dense bfloat16 FLOP/s, and bytes/s of its memory."""

D, FFN, LAYERS, VOCABULARY, KV, RANK = 4096, 14336, 32, 128256, 1024, 16
"""Llama-3-8B's shape, and the direction's rank."""

MATRICES = ((D, D), (D, KV), (D, KV), (D, D), (D, FFN), (D, FFN), (FFN, D))
"""d_in and d_out of a layer's weights: q, k, v, o, gate, up, down."""

PROBES, PROBE_TOKENS, PASSES = 40, 60, 3
"""Of the direction; a probe has a refusal and a compliant answer."""

SHARES = (0.3, 0.4, 0.5, 0.6)
"""Shares of the peak for which times are given, since none has been measured."""


@dataclass(frozen=True)
class Term:
    """One part of the work.

    Attributes:
        name: what it is.
        formula: its operations for one token, or its bytes.
        flop: operations for one token of the corpus.
        extra: whether it is there for norms (the default's cosine) alone.
    """

    name: str
    formula: str
    flop: float
    extra: bool = False


def terms(tokens: int, response: int) -> list[Term]:
    """Work the terms out.

    Args:
        tokens: T, of a row.
        response: R, those of them that the loss is on.

    Returns:
        The terms, operations of one token on average.
    """
    blocks = LAYERS * sum(d_in * d_out for d_in, d_out in MATRICES)
    sides = LAYERS * sum(d_in + d_out for d_in, d_out in MATRICES)
    head, share = VOCABULARY * D, response / tokens
    return [
        Term("blocks, forward", "2 sum d_in d_out", 2 * blocks),
        Term("blocks, backward to activations", "2 sum d_in d_out", 2 * blocks),
        Term("attention, forward", "2 T d a layer, half of T x T being causal", 2 * tokens * D * LAYERS),
        Term("attention, backward", "2.5 times that: scores once more, four products", 5 * tokens * D * LAYERS),
        Term("head and its gradient", "4 V d R/T; logits made twice: 6 V d R/T", 6 * head * share),
        Term(
            "direction, rank k",
            "2 k sum (d_in + d_out), three bfloat16 terms of its float32 factors",
            6 * RANK * (sides + share * (D + VOCABULARY)),
        ),
        Term("norms of the blocks", "T sum (d_in + d_out), pairs of tokens once", tokens * sides, extra=True),
        Term(
            "norm of the head",
            "logits once more, 2 V d R/T, and their pairs, R V R/T",
            (2 * head + response * VOCABULARY) * share,
            extra=True,
        ),
    ]


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--response", type=int, default=150)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    o = parser.parse_args()
    total = o.rows * o.tokens
    parts = terms(o.tokens, o.response)
    plain = sum(t.flop for t in parts if not t.extra)
    whole = sum(t.flop for t in parts)
    weights = 2 * (LAYERS * sum(a * b for a, b in MATRICES) + 2 * VOCABULARY * D)
    # a layer reads and writes about 12 vectors of d and 6 of the feed-forward width a token in each pass
    elementwise = 2 * 2 * LAYERS * (12 * D + 6 * FFN)
    batches = -(-total // o.batch_tokens)
    traffic = (total * elementwise + batches * 2 * weights) / BANDWIDTH / o.gpus
    print(f"""# What {o.rows:,} rows of {o.tokens} tokens would cost: Llama-3-8B, {o.gpus} H100 SXM, on paper

`python benchmarks/cost_model.py --rows {o.rows} --tokens {o.tokens} --response {o.response} --gpus {o.gpus}`:
T = {o.tokens} tokens a row, R = {o.response} of them with a loss, rank {RANK}, bfloat16. **Nothing here was measured.**
d is the width, V the vocabulary; sums go over the weights of all layers.
""")
    print("| term | operations a token | GFLOP a token | share |")
    print("|---|---|---|---|")
    for t in parts:
        print(f"| {t.name}{' (cosine)' if t.extra else ''} | {t.formula} | {t.flop / 1e9:.3f} | {t.flop / whole:.1%} |")
    print(f"| all, dot product | | {plain / 1e9:.2f} | |")
    print(f"| all, cosine (the default) | | {whole / 1e9:.2f} | 100 % |\n")
    print(f"{total / 1e6:.0f} M tokens make {total * plain / 1e18:.2f} and {total * whole / 1e18:.2f} EFLOP;")
    print(f"at {PEAK / 1e12:.0f} TFLOP/s a GPU, for the share of it that all of this reaches:\n")
    print("| share of the peak | dot product, minutes | cosine, minutes | cosine, tokens/s a GPU |")
    print("|---|---|---|---|")
    for share in SHARES:
        dot, cosine = (total * flop / (PEAK * share * o.gpus) / 60 for flop in (plain, whole))
        print(f"| {share:.0%} | {dot:.0f} | {cosine:.0f} | {total / o.gpus / cosine / 60:.0f} |")
    half = PEAK * 0.5
    sides = LAYERS * sum(a + b for a, b in MATRICES) + 2 * (VOCABULARY + D)
    probed = PROBES * 2 * PASSES * PROBE_TOKENS
    factors = 4 * (RANK + 24) * sides / 1e9
    print(f"""
Beside the operations:

- Norms, activations and residuals: 2 passes, 2 bytes, 12 d + 6 ffn numbers a layer and token, and the weights twice
  a batch of {o.batch_tokens} tokens: {traffic / 60:.1f} minutes at {BANDWIDTH / 1e12} TB/s, were none of it hidden.
- Weights: {weights / 1e9:.1f} GB a GPU; at 2 GB/s from a disk {weights / 2e9:.0f} s, once.
- The direction: {PROBES} probes, 2 answers each, {PROBE_TOKENS} tokens, {PASSES} passes: {probed:,} tokens,
  {probed * whole / half:.1f} s at half of the peak. Dense in float32 it takes {2 * weights / 1e9:.0f} GB; factors of
  rank {RANK}, with 24 columns more while they are made, {factors:.2f} GB.
- Tokenising runs ahead and must keep up with {o.rows * o.gpus * half / (total * whole):.0f} rows/s at half of the peak.
- Scores: about 60 bytes a row, {60 * o.rows / 1e6:.0f} MB. GPUs exchange nothing: each takes units of the corpus.
- Not counted: padding (packed rows have none), kernels' starts, uneven ends of units, duplicates.""")


if __name__ == "__main__":
    main()
