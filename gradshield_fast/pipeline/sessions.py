"""What each start of a run did: one JSON line when it begins, one for each unit, one when it ends.

A process writes a file of its own, line by line, so that a killed one has told all that it had done.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradshield_fast.errors import GradShieldError
from gradshield_fast.files import cannot_write
from gradshield_fast.pipeline.folder import RunFolder


@dataclass(frozen=True)
class Timing:
    """How a unit was scored.

    Attributes:
        unit: its number.
        rows: its rows.
        tokens: tokens of its rows that were scored.
        seconds: from its reading to its score, as far as scoring had to wait.
        waited: of those, for reading and encoding.
        halved: batches that did not fit into memory and were scored in halves.
        worker: who did it, where that is not the process that writes.
    """

    unit: int
    rows: int
    tokens: int
    seconds: float
    waited: float
    halved: int = 0
    worker: str = ""


class Session:
    """The file of one start.

    Attributes:
        path: the file.
        outcome: JSON values that the last line is to hold besides.
    """

    def __init__(self, folder: RunFolder, about: Mapping[str, Any]) -> None:
        """Begin it.

        Args:
            folder: the run's folder.
            about: JSON values that tell it from others, such as its shard.
        """
        now, host = datetime.datetime.now(datetime.timezone.utc), socket.gethostname()
        name = f"{now:%Y%m%dT%H%M%S.%f}-{host}-{os.getpid()}-{secrets.token_hex(2)}.jsonl"
        self.path = folder.sessions / name
        self._begun = time.perf_counter()
        self.outcome: dict[str, Any] = {}
        self._write({"started": now.isoformat(timespec="seconds"), "host": host, "pid": os.getpid(), **about})

    def begin(self) -> None:
        """Say that the first unit can be scored: model and direction are there."""
        self._write({"scoring": True})

    def add(self, timing: Timing) -> None:
        """Record a unit that is committed.

        Args:
            timing: how it was scored.
        """
        values = {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(timing).items()}
        self._write(values)

    def end(self, how: str, about: Mapping[str, Any]) -> None:
        """Say that the start is over.

        Args:
            how: "done", or the error's name.
            about: what else is to be said of it.
        """
        self._write({"ended": how, **self.outcome, **about})

    def _write(self, values: Mapping[str, Any]) -> None:
        line = {"at": round(time.perf_counter() - self._begun, 3), **values}
        try:
            with open(self.path, "a", encoding="ascii") as stream:
                stream.write(json.dumps(line) + "\n")
        except OSError as error:
            raise cannot_write(self.path, error) from error


@contextlib.contextmanager
def recorded(folder: RunFolder, about: Mapping[str, Any]) -> Iterator[Session]:
    """Keep the record of one start for the scope; a failure to end it hides no other error.

    Args:
        folder: the run's folder.
        about: as for `Session`.

    Yields:
        The session.
    """
    session = Session(folder, about)
    try:
        yield session
    except BaseException as error:
        with contextlib.suppress(GradShieldError):
            session.end(type(error).__name__, {"error": str(error)[:300]})
        raise
    session.end("done", {})


def read_sessions(folder: RunFolder) -> list[dict[str, Any]]:
    """Read what all starts did, in the order in which they began.

    Args:
        folder: the run's folder.

    Returns:
        For each: its first line's values, and "seconds", "waited", "rows", "tokens", "halved_batches" and "units" of
        what it scored; "ended" and the rest of its last line, where it came to one.
    """
    out = []
    for path in sorted(folder.sessions.glob("*.jsonl")):
        lines = list(_lines(path))
        if not lines:
            continue
        units = [line for line in lines if "unit" in line]
        begun = next((line["at"] for line in lines if "scoring" in line), None)
        session = {
            "log": path.name,
            **lines[0],
            "last": lines[-1]["at"],
            "seconds": round(lines[-1]["at"] - begun, 3) if begun is not None else 0.0,
            "waited": round(sum(unit["waited"] for unit in units), 3),
            "rows": sum(unit["rows"] for unit in units),
            "tokens": sum(unit["tokens"] for unit in units),
            "halved_batches": sum(unit["halved"] for unit in units),
            "units": [unit["unit"] for unit in units],
        }
        if "ended" in lines[-1]:
            session |= lines[-1]
        session.pop("at")
        out.append(session)
    return out


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Give the lines that are whole: the last one of a process that was killed may not be."""
    with open(path, "rb") as stream:
        for line in stream:
            try:
                value = json.loads(line)
            except ValueError:
                return
            yield value
