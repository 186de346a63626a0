"""The low-rank direction made without a dense gradient, against the dense one that is compressed: residual and time.

    python benchmarks/direction_passes.py --data DATA --model MODEL [--rank 16] [--passes 2 3] [--probes 40] [--record]

The residual is the true one, ||r - p q^T|| / ||r|| over the matrices that both have as factors, with r the dense
gradient of the same probes; "over the exact" divides it by that of each matrix's singular value decomposition cut at
the same rank, the least there is. Times are of one run each, in this order, the model already loaded.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.record import append, surroundings
from benchmarks.workload import PeakMemory, add_options, open_model
from gradshield_fast import Direction, SafetyProbes
from gradshield_fast.lowrank import LowRank


def residual(dense: dict[str, torch.Tensor], factors: dict[str, Any], names: list[str]) -> float:
    """Measure what factors leave out.

    Args:
        dense: weight -> gradient.
        factors: weight -> low-rank entry.
        names: weights to count.

    Returns:
        Relative Frobenius norm over these weights.
    """
    off = sum(
        float((dense[n].double() - factors[n].p.double() @ factors[n].q.double().T).square().sum()) for n in names
    )
    return (off / sum(float(dense[n].double().square().sum()) for n in names)) ** 0.5


def exact(dense: dict[str, torch.Tensor], names: list[str], rank: int) -> float:
    """Give the least residual that this rank allows, from singular values in float64.

    Args:
        dense: weight -> gradient.
        names: weights to count.
        rank: columns of the factors.

    Returns:
        Relative Frobenius norm.
    """
    dropped = total = 0.0
    for name in names:
        x = dense[name].double()
        gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x  # the embedding has 49,152 rows
        squares = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
        dropped, total = dropped + float(squares[rank:].sum()), total + float(squares.sum())
    return (dropped / total) ** 0.5


def main() -> None:
    """Make the directions; print and record residuals, seconds and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rows=0)
    parser.set_defaults(probes=40)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--passes", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--allow-unaligned", action="store_true", help="for a model that does not refuse its probes")
    parser.add_argument("--record", action="store_true", help="add a line to benchmarks/results/direction_passes.jsonl")
    options = parser.parse_args()
    model, tokenizer = open_model(options.model, options.dtype, options.threads)
    probes = SafetyProbes.default().subset(options.probes)

    def made(passes: int) -> tuple[Direction, dict[str, float | None]]:
        memory, begun = PeakMemory(), time.perf_counter()
        few = {"passes": passes, "rank": options.rank} if passes > 1 else {}
        with memory:
            found = Direction.from_probes(model, tokenizer, probes, allow_unaligned=options.allow_unaligned, **few)
        seconds = time.perf_counter() - begun
        return found, {"seconds": round(seconds, 2), "extra_mib": memory.extra}

    made(1)  # the first pass of a process pays for what the others find ready
    dense, about = made(1)
    begun = time.perf_counter()
    compressed = dense.low_rank(rank=options.rank)
    about["compressing_seconds"] = round(time.perf_counter() - begun, 2)
    entries: dict[str, Any] = dict(dense.parts[0])
    tried: dict[str, Any] = {"dense, compressed": (compressed, about)}
    tried |= {f"{passes} passes": made(passes) for passes in options.passes}
    common = [n for n in entries if all(isinstance(d.parts[0].get(n), LowRank) for d, _ in tried.values())]
    least = exact(entries, common, options.rank)
    told = {}
    for name, (direction, figures) in tried.items():
        found = residual(entries, dict(direction.parts[0]), common)
        told[name] = {"residual": found, "over_exact": found / least, "claimed": direction.residual, **figures}
        print(f"{name}: residual {found:.4f}, {found / least:.4f} of the exact one, {figures}")
    print(f"exact at rank {options.rank}: {least:.4f}, over {len(common)} matrices")
    if options.record:
        append("direction_passes", {**surroundings(vars(options)), "exact": least, "weights": len(common), **told})


if __name__ == "__main__":
    main()
