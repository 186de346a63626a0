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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.workload import RANDOM

ROOT = Path(__file__).resolve().parents[1]


def steps(data: str) -> dict[str, list[str]]:
    """List what is run.

    Args:
        data: folder of rows.

    Returns:
        Name -> command.
    """
    script = [sys.executable, "benchmarks/end_to_end.py", "--data", data, "--dtype", "bfloat16"]
    small = [*script, "--rows", "1024", "--batch-tokens", "32768"]
    large = [*script, "--model", RANDOM, "--rows", "512", "--batch-tokens", "16384", "--max-length", "1024"]
    return {
        "tests and ops": [sys.executable, "benchmarks/ops/run.py", "--device", "cuda"],
        "SmolLM2": small,
        "SmolLM2 with norms": [*small, "--norms"],
        "SmolLM2 compiled": [*small, "--compile"],
        "Llama-3-8B's shape": large,
        "Llama-3-8B's shape with norms": [*large, "--norms"],
        "Llama-3-8B's shape compiled": [*large, "--compile"],
        "Llama-3-8B's shape checkpointed": [*large, "--checkpoint"],
        "peers": ["make", "bench-peers", f"ARGS=--data {data} --dtype bfloat16 --rows 256"],
    }


def main(argv: list[str] | None = None) -> int:
    """Run the steps.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        Exit code: 0, 1 where a step failed, 2 where there is no GPU.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("GRADSHIELD_SHARED_DATA"), help="folder of rows")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench-gpu: torch sees no GPU on this machine, so nothing was run; `make bench` times the ops on its CPU")
        return 2
    if options.data is None:
        parser.error("give the data folder with --data or GRADSHIELD_SHARED_DATA")
    failed = []
    for name, command in steps(str(Path(options.data).resolve())).items():
        print(f"== {name}", flush=True)
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "every step ran to its end; see benchmarks/results")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
