"""Stop a run again and again, by whatever, go on each time, and see that its files are those of an undisturbed run.

    python benchmarks/interrupts.py --stops 30 --workers 2  # SIGKILL, SIGTERM and SIGINT at random moments
    python benchmarks/interrupts.py --every 1 --rows 9      # SIGKILL around every call that makes a file last

Random stops follow on one another in one folder until the run ends; then comes a new folder. The moments of `--every`
are those of fsync, rename, link and unlink, of the manifest, the parts, the record and the outputs, each in a folder of
its own; what is there after such a stop must already be as it will be in the end. The model is tiny and random, on the
CPU. Runs are forks of this process, which has imported everything and begun nothing.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

COMMITS = ("fsync", "replace", "link", "unlink")
SIGNALS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
MOST = 1000


def prepare(home: Path, rows: int, workers: int) -> list[str]:
    """Make a model, a direction and a corpus; give the command that filters it, but for the folder."""
    import torch
    from tiny import corpus, save_tiny

    from gradshield_fast import Direction
    from gradshield_fast.loading import load_model

    save_tiny(home / "model")
    model, _ = load_model(str(home / "model"), device="cpu")
    Direction({"lm_head.weight": torch.ones_like(model.get_parameter("lm_head.weight"))}).save(home / "d.safetensors")
    corpus(home / "rows.jsonl", rows)
    command = ["filter", home / "rows.jsonl", "--model", home / "model", "--direction", home / "d.safetensors"]
    command += ["--device", "cpu", "--part-rows", 4, "--batch-tokens", 512, "--threads", 1, "--workers", workers]
    return [str(word) for word in command]


def fork(command: list[str], out: Path, moment: int = 0) -> int:
    """Start a run in a fork, which is killed at a moment, or never for 0; give its number."""
    pid = os.fork()
    if pid:
        return pid
    from gradshield_fast.cli import main

    if moment:
        left = [moment]
        for name in COMMITS:
            setattr(os, name, _killing(left, getattr(os, name)))
    for stream in (1, 2):
        os.dup2(os.open(out.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    try:
        main([*command, "--out", str(out)])
    except SystemExit as end:
        os._exit(int(end.code or 0))
    finally:
        os._exit(99)


def _killing(left: list[int], call: Callable[..., Any]) -> Callable[..., Any]:
    def inner(*args: Any, **options: Any) -> Any:
        _count(left)
        out = call(*args, **options)
        _count(left)
        return out

    return inner


def _count(left: list[int]) -> None:
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def ended(pid: int) -> int:
    """Wait for a run; give its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(folder: Path) -> dict[str, bytes]:
    """Give the files that must not depend on what happened: all but the locks and the records of what happened."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    paths = [path for path in paths if path.parent.name != "sessions" and path.name != "run.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def finish(command: list[str], out: Path, whole: dict[str, bytes]) -> None:
    """Let a run come to its end, and compare."""
    code, found = ended(fork(command, out)), outcome(out)
    differ = sorted(name for name in whole.keys() | found.keys() if whole.get(name) != found.get(name))
    if code or differ:
        log = (out.parent / "log").read_text()[-2000:]
        raise SystemExit(f"{out.name}: exit code {code}; other files than undisturbed: {differ}\n{log}")


def stop_at_random(command: list[str], home: Path, whole: dict[str, bytes], stops: int, seconds: float) -> list[str]:
    """Stop a run at random moments, as often as asked for."""
    chance, done, folders = random.Random(0), [], 0
    while len(done) < stops:
        out = home / f"run-{folders}"
        folders += 1
        while len(done) < stops:
            number, delay = chance.choice(list(SIGNALS)), chance.uniform(0.02, 1.1) * seconds
            pid = fork(command, out)
            time.sleep(delay)
            os.kill(pid, number)
            code = ended(pid)
            if code == 0:
                break
            # before Python's own handlers are set, the system's way to end is the right one as well
            if code not in (SIGNALS[number], -number):
                raise SystemExit(f"{number.name} after {delay:.2f} s: ended with {code}")
            done.append(f"{number.name} {delay:.2f} s")
            print(f"{len(done):3d} {out.name} {done[-1]}", flush=True)
        finish(command, out, whole)
    print(f"{len(done)} stops in {folders} folders: every file is the undisturbed run's")
    return done


def stop_at_every(command: list[str], home: Path, whole: dict[str, bytes], step: int) -> int:
    """Kill a run at every moment in turn, or at every so many; say how many there are."""
    for moment in range(1, MOST, step):
        out = home / f"moment-{moment}"
        code = ended(fork(command, out, moment))
        if code == 0:
            print(f"killed at every moment, or every {step}th, of {moment - 1}: every file is the undisturbed run's")
            return moment - 1
        there = outcome(out)
        half = [name for name in there if not Path(name).name.startswith(".") and there[name] != whole[name]]
        if code != -signal.SIGKILL or half:
            raise SystemExit(f"moment {moment}: ended with {code}; not as it will be: {half}")
        finish(command, out, whole)
    raise SystemExit("more moments than expected")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stops", type=int, default=30, help="stops at random moments")
    parser.add_argument("--every", type=int, help="instead: at every moment (1), or every so many")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="append the outcome to results/interrupts.jsonl")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"] = "1", "false"
    # what every run imports, once
    import pyarrow.parquet  # noqa: F401
    import transformers.models.auto  # noqa: F401

    import gradshield_fast.pipeline.worker  # noqa: F401
    import gradshield_fast.scorer  # noqa: F401

    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        command = prepare(home, options.rows, options.workers)
        begun = time.perf_counter()
        if ended(fork(command, home / "whole")):
            raise SystemExit((home / "log").read_text())
        seconds, whole = time.perf_counter() - begun, outcome(home / "whole")
        if options.every:
            out: dict[str, Any] = {"moments": stop_at_every(command, home, whole, options.every)}
        else:
            out = {"stops": stop_at_random(command, home, whole, options.stops, seconds)}
    if options.record:
        import record

        print(record.append("interrupts", {**record.surroundings(vars(options)), **out, "different_files": 0}))


if __name__ == "__main__":
    main()
