"""The other end of a peer's process: starts it, asks it, and outlives its crashes."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class PeerFailed(Exception):
    """A peer answered with an error, died, or took too long; the message says which, in one line."""


class PeerProcess:
    """A worker in a process of its own; a context manager that ends it."""

    def __init__(self, python: str, log: Path, timeout: float) -> None:
        """Start the worker.

        Args:
            python: interpreter of the environment that the peer lives in.
            log: file for what it prints.
            timeout: seconds an answer may take.
        """
        self.timeout, self.log = timeout, log
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                [python, "-m", "benchmarks.peers.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
            )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.process.stdout, selectors.EVENT_READ)
        self._unread = b""

    def __enter__(self) -> PeerProcess:
        """Use it.

        Returns:
            The process.
        """
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the worker, whatever it is doing.

        Args:
            kind: type of the error that ends the block, if one does.
            error: that error.
            trace: its traceback.
        """
        self.process.kill()
        self.process.wait()
        self._selector.close()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # what was still to be sent has no reader any more
                    stream.close()

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer.

        Args:
            **command: see `worker.py`.

        Returns:
            The answer.

        Raises:
            PeerFailed: there is none, or it is an error.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise PeerFailed(self._last_words()) from None
        answer = json.loads(self._line())
        if "error" in answer:
            with self.log.open("a") as file:
                file.write(answer["trace"])
            raise PeerFailed(answer["error"])
        return answer

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        end = time.monotonic() + self.timeout
        while b"\n" not in self._unread:
            if not self._selector.select(max(0.0, end - time.monotonic())):
                raise PeerFailed(f"no answer within {self.timeout:.0f} s")
            piece = self.process.stdout.read()
            if piece == b"":
                raise PeerFailed(self._last_words())
            self._unread += piece or b""
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _last_words(self) -> str:
        code = self.process.wait()
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"its process ended ({how}): {lines[-1] if lines else 'no output'}"
