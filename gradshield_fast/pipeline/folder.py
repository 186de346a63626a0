"""A run's folder: who may write in it, and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gradshield_fast.errors import InputError
from gradshield_fast.files import cannot_write, remove, write_once, write_whole

RUN_FORMAT = "gradshield_fast.run.2"
Shard = tuple[int, int]


class RunFolder:
    """Names, writes and locks the files of a run.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def manifest(self) -> Path:
        """What the run is about, and its units; written once."""
        return self.path / "manifest.json"

    @property
    def prepared(self) -> Path:
        """What all its workers must agree on: the model, the encoder, the row that is tried first; written once."""
        return self.path / "prepared.json"

    @property
    def batches(self) -> Path:
        """The tokens of a batch where they were to be found out; written once."""
        return self.path / "batches.json"

    @property
    def record(self) -> Path:
        """All of it in one file, for a person; written when the scores are complete, and when the corpus is split."""
        return self.path / "run.json"

    @property
    def direction(self) -> Path:
        """The direction that its rows are scored against."""
        return self.path / "direction.safetensors"

    @property
    def duplicates(self) -> Path:
        """The rows that say what an earlier one says."""
        return self.path / "duplicates.npy"

    @property
    def scores(self) -> Path:
        """The folder of its parts."""
        return self.path / "scores"

    @property
    def sessions(self) -> Path:
        """The folder of what each start did."""
        return self.path / "sessions"

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
            self.sessions.mkdir(exist_ok=True)
            others = {entry.name for entry in self.path.iterdir()}
        except OSError as error:
            raise cannot_write(self.path, error) from error
        known = {"scores", "sessions", self.record.name, self.direction.name, self.duplicates.name}
        others = {name for name in others - known if not name.startswith(".")}
        if others and not self.manifest.exists():
            raise InputError(
                f"output folder {self.path} holds {sorted(others)[0]} but no run; name a new or an empty folder"
            )

    @contextlib.contextmanager
    def locked(self, shard: Shard | None = None) -> Iterator[None]:
        """Keep others out of the folder for the scope, where the system has file locks.

        Shards of one number let each other in. What a process that was killed had half written is removed: the lock
        says that it is nobody's.

        Args:
            shard: index, from 1, and number of shards; None: let nobody in.

        Raises:
            InputError: A process is at work in it.
        """
        busy = f"output folder {self.path} is in use by another gradshield-fast"
        with contextlib.ExitStack() as stack:
            if shard is None:
                stack.enter_context(self._lock(".lock", f"{busy}; wait for it, or name another one"))
                self._sweep(".*.tmp", f".{self.direction.name}.*")
            else:
                stack.enter_context(self._lock(".lock", f"{busy} that is no shard; wait for it", shared=True))
                index, count = shard
                self._refuse_other_counts(count, busy)
                name = f".shard-{index}-of-{count}.lock"
                stack.enter_context(self._lock(name, f"shard {index}/{count} is already at work in {self.path}"))
            yield

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Let one process after another prepare what all of them use."""
        with self._lock(".prepare.lock", None):
            yield

    @contextlib.contextmanager
    def _lock(self, name: str, busy: str | None, shared: bool = False) -> Iterator[None]:
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        path = self.path / name
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise cannot_write(path, error) from error
        try:
            try:
                fcntl.flock(
                    handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if busy is None else fcntl.LOCK_NB)
                )
            except BlockingIOError as error:
                raise InputError(str(busy)) from error
            except OSError as error:
                raise InputError(f"output folder {self.path} cannot be locked: {error.strerror or error}") from error
            yield
        finally:
            os.close(handle)

    def _refuse_other_counts(self, count: int, busy: str) -> None:
        for path in self.path.glob(".shard-*-of-*.lock"):
            if not path.name.endswith(f"-of-{count}.lock"):
                with self._lock(path.name, f"{busy}, as {path.name[1:-5]}: shards of one run have one number"):
                    pass

    def working(self) -> bool:
        """Say whether a process is at work in the folder.

        Returns:
            Whether one of this machine, or of one whose file locks are seen here, holds a lock.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            return False
        # shared where a start needs it shared or alone, so that looking keeps nobody out for longer than it takes
        for path in [self.path / ".lock", *self.path.glob(".shard-*.lock")]:
            kind = fcntl.LOCK_SH if path.name == ".lock" else fcntl.LOCK_EX
            with contextlib.suppress(FileNotFoundError, PermissionError):
                handle = os.open(path, os.O_RDONLY)
                try:
                    fcntl.flock(handle, kind | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
                finally:
                    os.close(handle)
        return False

    def _sweep(self, *patterns: str) -> None:
        for folder in (self.path, self.scores):
            for pattern in patterns:
                for path in folder.glob(pattern):
                    with contextlib.suppress(OSError):
                        remove(path)

    def read(self, path: Path) -> dict[str, Any] | None:
        """Read one of the folder's JSON files.

        Args:
            path: which.

        Returns:
            Its content, or None if it is not there.

        Raises:
            InputError: It is damaged, or of another version's form.
        """
        try:
            value = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}; name a new folder") from error
        if not isinstance(value, dict):
            raise InputError(f"{path} is damaged: expected a JSON object; name a new folder")
        if path in (self.manifest, self.record) and value.get("format") != RUN_FORMAT:
            raise InputError(
                f"{path} is of the form {value.get('format')!r}, which this version does not go on with "
                f"(it writes {RUN_FORMAT!r}); name a new folder"
            )
        return value

    def read_threshold(self) -> dict[str, Any] | None:
        """Read the cut.

        Returns:
            The cut, or None if none was made.
        """
        return self.read(self.threshold)

    def write(self, target: Path, value: Mapping[str, Any]) -> None:
        """Write a JSON file.

        Args:
            target: One of the folder's files.
            value: What it is to hold.
        """
        write_whole(target, _json(value))

    def publish(self, target: Path, value: Mapping[str, Any]) -> dict[str, Any]:
        """Write a JSON file that is written once.

        Args:
            target: One of the folder's files.
            value: What it is to hold, unless it is there.

        Returns:
            What it holds.
        """
        write_once(target, _json(value))
        standing = self.read(target)
        assert standing is not None
        return standing


def _json(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, indent=1)
    return (text + "\n").encode("ascii")
