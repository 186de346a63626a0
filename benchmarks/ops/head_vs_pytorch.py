"""Time and memory of the fused head against PyTorch's own logits, cross-entropy and backward, the head's weight frozen.

    python benchmarks/ops/head_vs_pytorch.py --tokens 1024 --vocabulary 49152 --d 576 --threads 2

What is compared, each giving losses and dL/dh:

    native      linear_cross_entropy, float32 results within the bound of tests/ops/test_linear_cross_entropy.py
    rounded     the same with exact=False: the gradient is rounded to bfloat16 once, as `plain` rounds it
    native+r    native with a direction of rank 16, whose ghost dot comes along
    rounded+r   rounded with that direction
    reference   linear_cross_entropy in blocks of plain PyTorch
    upcast      logits in the inputs' dtype, made float32, then cross-entropy and backward: what Hugging Face models do
    plain       logits, cross-entropy and backward in the inputs' dtype

Rounds take turns, and the best of each counts, since other work on the machine only ever adds time. Memory is how far a
fresh process grows beyond its inputs at its peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from record import device_name

from gradshield_fast.ops import linear_cross_entropy

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
VARIANTS = ("native", "rounded", "native+r", "rounded+r", "reference", "upcast", "plain")


def inputs(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight and labels.

    Args:
        options: the sizes, and what the logits look like: "flat" ones are normal with deviation 1; "peaked" ones have
            deviation 2, and the label and four more words of each token stand out by up to 16.

    Returns:
        h, weight, labels.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(options.vocabulary, options.d, generator=generator)
    labels = torch.randint(0, options.vocabulary, (options.tokens,), generator=generator)
    h = torch.randn(options.tokens, options.d, generator=generator) / options.d**0.5
    if options.logits == "peaked":
        height = 16 * torch.rand(options.tokens, 1, generator=generator)
        h = 2 * h + height / options.d * weight[labels]
        for i in range(1, 5):
            h += (height - 2 * i) / options.d * weight[(labels + 7919 * i) % options.vocabulary]
    dtype = DTYPES[options.dtype]
    return h.to(dtype), weight.to(dtype), labels


def variants(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Everything that is compared, ready to be called.

    Args:
        options: the sizes.

    Returns:
        Name -> call.
    """
    h, weight, labels = inputs(options)
    p, q = torch.randn(options.vocabulary, 16), torch.randn(options.d, 16)

    def pytorch(upcast: bool) -> torch.Tensor | None:
        leaf = h.clone().requires_grad_()
        logits = torch.nn.functional.linear(leaf, weight)
        logits = logits.float() if upcast else logits
        torch.nn.functional.cross_entropy(logits, labels, reduction="none").sum().backward()
        return leaf.grad

    return {
        "native": lambda: linear_cross_entropy(h, weight, labels, backend="native"),
        "rounded": lambda: linear_cross_entropy(h, weight, labels, exact=False, backend="native"),
        "native+r": lambda: linear_cross_entropy(h, weight, labels, p=p, q=q, backend="native"),
        "rounded+r": lambda: linear_cross_entropy(h, weight, labels, p=p, q=q, exact=False, backend="native"),
        "reference": lambda: linear_cross_entropy(h, weight, labels, backend="reference"),
        "upcast": lambda: pytorch(True),
        "plain": lambda: pytorch(False),
    }


def resident(field: str) -> float:
    """Read a line of the process's memory account.

    Args:
        field: "VmRSS" for now, "VmHWM" for the most since the account was last cleared.

    Returns:
        MiB.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak(call: Callable[[], object]) -> float:
    """Measure how far the process grows while a call runs.

    Args:
        call: what to run.

    Returns:
        MiB beyond what was there before.
    """
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return resident("VmHWM") - before


def main() -> None:
    """Run the comparison and print one line for each variant, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--d", type=int, default=576)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--logits", choices=("flat", "peaked"), default="peaked")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--peak", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    calls = variants(options)
    if options.peak:
        print(peak(calls[options.peak]))
        return
    best = dict.fromkeys(options.only, float("inf"))
    for _ in range(options.rounds):
        for name in best:
            start = time.perf_counter()
            calls[name]()
            best[name] = min(best[name], time.perf_counter() - start)
    memory = {
        name: float(subprocess.check_output([sys.executable, *sys.argv, "--peak", name]).decode()) for name in best
    }
    sizes = f"{options.tokens} tokens, {options.vocabulary} x {options.d}"
    print(f"{device_name()}; {sizes}, {options.dtype}, {options.logits} logits")
    for name, seconds in best.items():
        print(f"  {name:10} {seconds * 1e3:9.1f} ms {memory[name]:9.1f} MiB {seconds / best[options.only[0]]:6.2f} x")
    print(json.dumps({"options": vars(options), "seconds": best, "mebibytes": memory}))


if __name__ == "__main__":
    main()
