"""Stop a run again and again, by whatever, go on each time, and see that its files are those of an undisturbed run.

Some stops come at a random moment as SIGKILL, SIGTERM or SIGINT; the others are SIGKILL at a chosen moment, just before
or just after a call that flushes, renames or links a file: a part, the manifest, the record, an output. A run that
comes to its end before enough stops is followed by another in a new folder. A tiny random model, on the CPU.

    python benchmarks/interrupts.py --stops 30 --workers 0
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

COMMITS = ("fsync", "replace", "link")
SIGNALS = {"SIGKILL": -9, "SIGTERM": 143, "SIGINT": 130}
CHILD = """
import os, signal, sys
left, after = int(sys.argv.pop(1)), sys.argv.pop(1) == "after"
def stopping(call):
    def inner(*args, **options):
        global left
        left -= 1
        if left == 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        out = call(*args, **options)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return out
    return inner
if __name__ == "__main__":
    for name in ("fsync", "replace", "link"):
        setattr(os, name, stopping(getattr(os, name)))
    from gradshield_fast.cli import main
    main()
"""


def prepare(home: Path, rows: int) -> list[str]:
    """Make a model, a direction and a corpus; give the command that filters it, but for the folder."""
    import torch
    from tiny import corpus, save_tiny

    from gradshield_fast import Direction
    from gradshield_fast.loading import load_model

    save_tiny(home / "model")
    model, _ = load_model(str(home / "model"), device="cpu")
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(w.shape, generator=generator) for name, w in model.named_parameters()}
    Direction(tensors).save(home / "d.safetensors")
    corpus(home / "rows.jsonl", rows)
    command = ["filter", home / "rows.jsonl", "--model", home / "model", "--device", "cpu", "--part-rows", 16]
    command += ["--batch-tokens", 512, "--direction", home / "d.safetensors", "--threads", 1]
    return [str(word) for word in command]


def outcome(folder: Path) -> dict[str, bytes]:
    """Give the files that must not depend on what happened."""
    paths = [*folder.glob("*.jsonl"), *folder.glob("scores/*"), folder / "threshold.json", folder / "manifest.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def finish(command: list[str], out: Path) -> float:
    """Run a command to its end."""
    begun = time.perf_counter()
    arguments = [sys.executable, "-m", "gradshield_fast", *command, "--out", str(out)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the run failed: {done.stderr}")
    return time.perf_counter() - begun


def stop_once(command: list[str], out: Path, chance: random.Random, seconds: float, child: Path) -> tuple[str, bool]:
    """Start the run and stop it; say how, and whether it was still at work."""
    words = [*command, "--out", str(out)]
    if chance.random() < 0.5:
        at, side = chance.randrange(1, 190), chance.choice(["before", "after"])
        arguments = [sys.executable, str(child), str(at), side, *words]
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        _, err = process.communicate()
        how, expected = f"SIGKILL {side} commit {at}", -9
    else:
        name = chance.choice(list(SIGNALS))
        arguments = [sys.executable, "-m", "gradshield_fast", *words]
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        delay = chance.uniform(0.3, 1.0) * seconds
        try:
            _, err = process.communicate(timeout=delay)
        except subprocess.TimeoutExpired:
            process.send_signal(getattr(signal, name))
            _, err = process.communicate()
        how, expected = f"{name} after {delay:.1f} s", SIGNALS[name]
    # a signal before Python has set its handlers ends it in the system's way
    natural = {expected, -signal.SIGTERM, -signal.SIGINT} if expected != -9 else {expected}
    if process.returncode not in natural | {0}:
        raise SystemExit(f"{how}: ended with {process.returncode}: {err.decode()}")
    return how, process.returncode != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stops", type=int, default=30)
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="append the outcome to results/interrupts.jsonl")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        child = home / "child.py"
        child.write_text(CHILD)
        command = prepare(home, options.rows)
        seconds = finish([*command, "--workers", "0"], home / "whole")
        whole = outcome(home / "whole")
        command += ["--workers", str(options.workers)]
        stops: list[str] = []
        folders = 0
        while len(stops) < options.stops:
            out = home / f"run-{folders}"
            folders += 1
            for _ in range(chance.randrange(1, 8)):
                how, was_working = stop_once(command, out, chance, seconds, child)
                if was_working:
                    stops.append(how)
                print(f"{len(stops):3d} {how}{'' if was_working else ': it had ended'}", flush=True)
                if not was_working or len(stops) == options.stops:
                    break
            finish(command, out)
            found = outcome(out)
            differ = sorted(path for path in whole.keys() | found.keys() if whole.get(path) != found.get(path))
            left = [path.name for path in out.rglob("*.tmp")]
            if differ or left:
                raise SystemExit(f"{out.name}: other files than undisturbed: {differ}; left behind: {left}")
        print(f"{len(stops)} stops in {folders} folders: every file is the undisturbed run's")
        if options.record:
            line = {**record.surroundings(vars(options)), "stops": stops, "folders": folders, "different_files": 0}
            print(record.append("interrupts", line))


if __name__ == "__main__":
    main()
