"""A run that is stopped from outside, by a signal that it can catch or one that it cannot, and goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import corpus

from gradshield_fast import Direction
from gradshield_fast.loading import load_model

INTERRUPTS = Path(__file__).parents[2] / "benchmarks" / "interrupts.py"

Start = Callable[[Path], "subprocess.Popen[str]"]
ROWS, PART = 400, 4

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Start the same run in a given folder."""
    home = tmp_path_factory.mktemp("interrupts")
    model, _ = load_model(str(tiny_model), device="cpu")
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(w.shape, generator=generator) for name, w in model.named_parameters()}
    Direction(tensors).save(home / "d.safetensors")
    rows = corpus(home / "rows.jsonl", ROWS)
    command = [sys.executable, "-m", "gradshield_fast", "filter", rows, "--model", tiny_model, "--device", "cpu"]
    command += ["--direction", home / "d.safetensors", "--part-rows", PART, "--batch-tokens", 256]

    def call(out: Path) -> subprocess.Popen[str]:
        arguments = [str(argument) for argument in [*command, "--out", out]]
        # a session of its own, so that no signal of the test's reaches pytest, and none of pytest's reaches the run
        return subprocess.Popen(
            arguments,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            # a shell that starts the tests in the background has them ignore it, and so whatever they start
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    return call


@pytest.fixture(scope="module")
def undisturbed(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(out)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def parts(out: Path) -> list[Path]:
    return sorted((out / "scores").glob("part-*.parquet"))


def stop_after_some_parts(process: subprocess.Popen[str], out: Path, number: signal.Signals) -> str:
    deadline = time.monotonic() + 120
    while len(parts(out)) < 3:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    return process.communicate(timeout=120)[1]


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "interrupted; run the same command again to go on"),
        (signal.SIGTERM, 143, "terminated; run the same command again to go on"),
        (signal.SIGKILL, -signal.SIGKILL, None),
    ],
    ids=["SIGINT", "SIGTERM", "SIGKILL"],
)
def test_a_run_that_is_stopped_goes_on_to_the_same_files(
    start: Start, undisturbed: Path, tmp_path: Path, number: signal.Signals, code: int, line: str | None
) -> None:
    out = tmp_path / "run"
    process = start(out)
    err = stop_after_some_parts(process, out, number)
    assert process.returncode == code, err
    assert "Traceback" not in err
    if line is not None:
        assert err.splitlines()[-1] == line
        assert not list(out.rglob("*.tmp"))
    committed = parts(out)
    assert 3 <= len(committed) < ROWS // PART
    assert not (out / "kept.jsonl").exists()

    times = {path: path.stat().st_mtime_ns for path in committed}
    again = start(out)
    _, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert {path: path.stat().st_mtime_ns for path in committed} == times
    for name in ("kept.jsonl", "dropped.jsonl", "unscored.jsonl", "threshold.json"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes()
    assert [path.read_bytes() for path in parts(out)] == [path.read_bytes() for path in parts(undisturbed)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--every", 11, "--rows", 9), "every 11th"),
        (("--stops", 5, "--rows", 200), "5 stops"),
        (("--stops", 2, "--rows", 200, "--workers", 1), "2 stops"),
    ],
    ids=["at commits", "at random", "with a worker process"],
)
def test_a_run_that_is_killed_anywhere_goes_on_to_the_same_files(options: tuple[object, ...], said: str) -> None:
    command = [sys.executable, INTERRUPTS, *options]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert said in done.stdout.splitlines()[-1]
    assert "undisturbed" in done.stdout.splitlines()[-1]
