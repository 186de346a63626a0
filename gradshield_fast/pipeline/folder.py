"""A run's folder: one owner at a time, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gradshield_fast.errors import InputError
from gradshield_fast.files import cannot_write, write_whole

MANIFEST_FORMAT = "gradshield_fast.run.1"


class RunFolder:
    """Names and writes the files of a run.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def manifest(self) -> Path:
        """The run's record."""
        return self.path / "run.json"

    @property
    def direction(self) -> Path:
        """The direction that its rows are scored against."""
        return self.path / "direction.safetensors"

    @property
    def scores(self) -> Path:
        """The folder of its parts."""
        return self.path / "scores"

    @property
    def threshold(self) -> Path:
        """The cut."""
        return self.path / "threshold.json"

    def create(self) -> None:
        """Make the folder, unless it is there.

        Raises:
            InputError: It cannot be made, or something that is not a run is in it.
        """
        try:
            self.scores.mkdir(parents=True, exist_ok=True)
            others = {entry.name for entry in self.path.iterdir()} - {".lock", "scores"}
        except OSError as error:
            raise cannot_write(self.path, error) from error
        others = {name for name in others if not name.endswith(".tmp")}
        if others and not self.manifest.exists():
            raise InputError(
                f"output folder {self.path} holds {sorted(others)[0]} but no run; name a new or an empty folder"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process out of the folder for the scope, where the system has file locks.

        Raises:
            InputError: A process is at work in it.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        try:
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise cannot_write(self.path / ".lock", error) from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"output folder {self.path} is in use by another gradshield-fast; wait for it, or name another one"
                ) from error
            except OSError as error:
                raise InputError(f"output folder {self.path} cannot be locked: {error.strerror or error}") from error
            self._sweep()
            yield
        finally:
            os.close(handle)

    def _sweep(self) -> None:
        """Remove what a process that was killed had half written; the lock says that it is nobody's."""
        for folder in (self.path, self.scores):
            for pattern in (".*.tmp", f".{self.direction.name}.*"):
                for path in folder.glob(pattern):
                    with contextlib.suppress(OSError):
                        path.unlink()

    def read_manifest(self) -> dict[str, Any] | None:
        """Read the run's record.

        Returns:
            The record, or None if there is none.

        Raises:
            InputError: It is damaged, or of another version's form.
        """
        manifest = _read_json(self.manifest)
        if manifest is not None and manifest.get("format") != MANIFEST_FORMAT:
            raise InputError(
                f"{self.manifest} is of the form {manifest.get('format')!r}, which this version does not go on with "
                f"(it writes {MANIFEST_FORMAT!r}); name a new folder"
            )
        return manifest

    def read_threshold(self) -> dict[str, Any] | None:
        """Read the cut.

        Returns:
            The cut, or None if none was made.
        """
        return _read_json(self.threshold)

    def write_json(self, target: Path, value: Mapping[str, Any]) -> None:
        """Write a JSON file.

        Args:
            target: One of the folder's files.
            value: What it is to hold.
        """
        write_whole(target, (json.dumps(value, indent=1) + "\n").encode("ascii"))


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; name a new folder") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is damaged: expected a JSON object; name a new folder")
    return value
