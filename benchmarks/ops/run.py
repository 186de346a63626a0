"""Every op's tests and timings on one device, in one command, with the results kept.

    python benchmarks/ops/run.py --device cuda [--models smollm2 llama-3-8b] [--dtypes bfloat16 float32] [--tokens 8192]
    python benchmarks/ops/run.py --device cpu --models smollm2 llama-3.2-1b --tokens 1024 [--compile]

On a GPU it first runs the tests marked `gpu`, on a CPU those of the ops, and ends there if one fails: an op whose tests
are red is not timed. Then it times every op at the layers of the models, backends in turns, and adds one JSON line a
timing to benchmarks/results/ops-cuda.jsonl or ops-cpu.jsonl. With --device cuda and no GPU it says so and ends with 2.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import append, surroundings

from gradshield_fast.op_bench import as_json, roofs, time_case
from gradshield_fast.op_cases import DTYPES, MODELS, OPS, make_case

ROOT = Path(__file__).resolve().parents[2]


def main(argv: list[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        Exit code: 0, 1 where a test failed, 2 where there is no GPU.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=list(DTYPES))
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=list(OPS))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the reference")
    parser.add_argument("--no-tests", action="store_true")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU that torch can see: nothing was run")
        return 2
    if not options.no_tests:
        which = ["-m", "gpu"] if options.device == "cuda" else ["tests/ops"]
        tests = subprocess.run([sys.executable, "-m", "pytest", "-q", *which], cwd=ROOT, check=False)
        if tests.returncode:
            return 1
    device = torch.device(options.device)
    about = surroundings(vars(options))
    for dtype in options.dtypes:
        roof = roofs(device, DTYPES[dtype])
        for model in options.models:
            for op in options.ops:
                case = make_case(op, model, options.tokens, dtype, device)
                for timing in time_case(case, device, roof, compiled=options.compile, seconds=options.seconds):
                    peak = {"copy_bytes_s": roof.bytes, "matmul_flop_s": roof.flop}
                    append(f"ops-{options.device}", {**about, "model": model, **peak, **as_json(timing)})
                    said = timing.note or f"{timing.p50:.4f} ms, {timing.of_roof:.0%} of the {timing.bound} roof"
                    print(f"{model} {dtype} {op} {timing.backend}: {said}", flush=True)
                del case
                if options.device == "cuda":
                    torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
