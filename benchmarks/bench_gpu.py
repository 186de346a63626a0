"""Everything that wants a GPU, in one command: its tests, the ops, whole models, the peers. Results are kept.

    make bench-gpu ARGS="--data DATA"

A step that fails is named at the end, and does not keep the others from running. Without a GPU it says so, ends with 2
and has run nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def steps(data: str, tokenizer: str | None = None) -> dict[str, list[str]]:
    """List what is run.

    Args:
        data: folder of rows.
        tokenizer: a tokenizer's folder, for a machine without the demo model: then SmolLM2 has random weights, and
            the peers, which load their model by its name, do not run.

    Returns:
        Name -> command.
    """
    script = [sys.executable, "benchmarks/end_to_end.py", "--data", data, "--dtype", "bfloat16"]
    script += [] if tokenizer is None else ["--tokenizer", tokenizer]
    small = [*script, *([] if tokenizer is None else ["--model", "smollm2-random"])]
    small += ["--rows", "1024", "--batch-tokens", "32768", "--ways"]
    large = [*script, "--model", "llama-3-8b-random", "--rows", "512", "--batch-tokens", "16384"]
    large += ["--max-length", "1024"]
    found = {
        "tests and ops": [sys.executable, "benchmarks/ops/run.py", "--device", "cuda"],
        "SmolLM2": small,
        "Llama-3-8B's shape": [*large, "--ways"],
        "Llama-3-8B's shape checkpointed": [*large, "--checkpoint"],
    }
    if tokenizer is None:
        found["peers"] = ["make", "bench-peers", f"ARGS=--data {data} --dtype bfloat16 --rows 256"]
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the steps.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        Exit code: 0, 1 where a step failed, 2 where there is no GPU.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("GRADSHIELD_SHARED_DATA"), help="folder of rows")
    parser.add_argument("--tokenizer", help="folder of a tokenizer, where there is no demo model: weights are random")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench-gpu: torch sees no GPU on this machine, so nothing was run; `make bench` times the ops on its CPU")
        return 2
    if options.data is None:
        parser.error("give the data folder with --data or GRADSHIELD_SHARED_DATA")
    failed = []
    for name, command in steps(str(Path(options.data).resolve()), options.tokenizer).items():
        print(f"== {name}", flush=True)
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "every step ran to its end; see benchmarks/results")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
