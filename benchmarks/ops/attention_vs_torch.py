"""Attention's two passes against torch's own, on rows of one length, so that torch's padded batch has no padding.

python benchmarks/ops/attention_vs_torch.py [--threads 2] [--tokens 2048] [--repeats 9] [--dtype float32]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from gradshield_fast.op_cases import DTYPES, HEADS
from gradshield_fast.ops import varlen_attention


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median of some calls, after two that are not counted."""
    spent = []
    for _ in range(repeats + 2):
        begun = time.perf_counter()
        call()
        spent.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(spent[2:])


def passes(attend: Callable[..., torch.Tensor], inputs: list[torch.Tensor], repeats: int) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward pass."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    with torch.no_grad():
        forward = milliseconds(lambda: attend(q, k, v), repeats)
    out = attend(q, k, v)
    return forward, milliseconds(lambda: torch.autograd.grad(out, (q, k, v), inputs[3], retain_graph=True), repeats)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2", "llama-3-8b"], choices=list(HEADS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 128, 256, 512, 2048])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| model | rows x tokens | forward, ms | torch's | backward, ms | torch's | ratios |\n" + "|---" * 7 + "|")
    for model in args.models:
        heads, kv_heads, d = HEADS[model]
        for length in args.lengths:
            rows = max(args.tokens // length, 1)
            cu = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
            packed = [
                torch.randn(rows * length, h, d).to(DTYPES[args.dtype]) for h in (heads, kv_heads, kv_heads, heads)
            ]
            batch = [x.view(rows, length, -1, d).transpose(1, 2) for x in packed]

            def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor = cu) -> torch.Tensor:
                return varlen_attention(q, k, v, cu, backend=args.backend)

            def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

            x, y = passes(ours, packed, args.repeats), passes(theirs, batch, args.repeats)
            print(f"| {model} | {rows} x {length} | {x[0]:.2f} | {y[0]:.2f} | {x[1]:.2f} | {y[1]:.2f} ", end="")
            print(f"| {y[0] / x[0]:.1f}, {y[1] / x[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
