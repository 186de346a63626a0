"""What each op must move and compute at least, and how long that takes an H100 on paper.

    python benchmarks/ops/floors.py > benchmarks/ops/FLOORS.md

Bytes and operations come from the formulas that the benchmarks use (every input read once, every output written once).
The times are arithmetic, not measurements: bytes over the memory's peak, operations over the matrix units' peak.
"""

from __future__ import annotations

import torch

from gradshield_fast.op_cases import OPS, make_case

TOKENS = 8192
MODELS = ("smollm2", "qwen3-4b", "llama-3-8b")
BYTES, BFLOAT16, FLOAT32 = 3.35e12, 989e12, 67e12
"""H100 SXM, from NVIDIA's data sheet: memory bytes a second, bfloat16 tensor core and float32 operations a second."""

TERMS = {"ghost_dot": 3, "ghost_dot_lowrank": 3, "ghost_project": 3, "linear_cross_entropy": 2.5}
"""How many 16-bit products an operation takes where a float32 factor is split into three bfloat16 terms: three with a
float32 direction; in the head the logits take one, in each of two passes, and dL/dh three."""

REACHED = {
    "ghost_dot": "r a never leaves the registers; position terms are all that is written",
    "ghost_dot_lowrank": "a and g are read once for up to 64 columns; few tokens are cut along d to fill the device",
    "ghost_norm_sq": "the cheaper form for each example; neither matrix of products is written",
    "ghost_gram": "tiles of both products stay in registers; pairs are masked to their examples",
    "ghost_project": "both projections as above; the sum over an example's tokens in float32",
    "embedding_dot": "rows of r are read where they lie",
    "scale_dot": "g x_hat stays in registers",
    "linear_cross_entropy": "logits stay in registers in the first pass; in the second, g passes through 64 MiB",
    "varlen_attention": "both passes; scores are made again in the backward pass, and never written",
}


HEAD = f"""# Floors on paper, H100 SXM

`python benchmarks/ops/floors.py`; {TOKENS} tokens in bfloat16, directions in float32, one direction, rank 16;
3.35 TB/s, 989 TFLOP/s bfloat16 (dense). **Nothing here was measured.** *Units* counts what the matrix units multiply
where a float32 factor is split into bfloat16 terms, which is what exactness costs.

| op | layer of | tokens x in x out, rows | MB | GFLOP | GFLOP on units | memory, us | units, us | bound by |
|---|---|---|---|---|---|---|---|---|"""


def main() -> None:
    """Print the table."""
    print(HEAD)
    for op in OPS:
        for model in MODELS:
            case = make_case(op, model, TOKENS, "bfloat16", torch.device("meta"))
            units = case.flop * TERMS.get(op, 1)
            vector = op in ("embedding_dot", "scale_dot")
            memory, compute = 1e6 * case.bytes / BYTES, 1e6 * units / (FLOAT32 if vector else BFLOAT16)
            print(
                f"| `{op}` | {model} | {case.shape} "
                f"| {case.bytes / 1e6:.1f} | {case.flop / 1e9:.2f} | {units / 1e9:.2f} "
                f"| {memory:.1f} | {compute:.1f} | {'memory' if memory >= compute else 'products'} |"
            )
    print("\nHow the kernels come near it:\n")
    for op in OPS:
        print(f"- `{op}`: {REACHED[op]}.")


if __name__ == "__main__":
    main()
