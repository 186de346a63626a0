"""Which backend was fastest: measured once for an op, a device and a class of shapes, kept on disk, open to read.

Only on a GPU does `auto` ask here. On a CPU the order of a room and its modules' `not_for_auto` decide.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gradshield_fast.errors import InputError
from gradshield_fast.files import write_whole

ROUNDS = 5
"""Timed calls of each backend, in turns; the median counts."""

Table = dict[str, dict[str, Any]]

_LOCK = threading.Lock()
_LOADED: dict[Path, Table] = {}


def cache_file() -> Path:
    """Name the file that measurements are kept in.

    Returns:
        `backends.json` in the user's cache folder.
    """
    return _below(os.environ.get("XDG_CACHE_HOME"))


@cache
def _below(base: str | None) -> Path:
    """The file below a cache folder; asked at every call of an op, and paths are slow to put together."""
    return Path(base or Path.home() / ".cache") / "gradshield_fast" / "backends.json"


def measurements() -> Table:
    """Read what was measured and what was preferred.

    Returns:
        "op | device | shapes" -> {"backend", "milliseconds": {backend: median}}; "op" -> {"backend"} where a person
        preferred one.
    """
    with _LOCK:
        return {key: dict(entry) for key, entry in _table().items()}


def clear() -> None:
    """Forget every measurement and preference, on disk too."""
    with _LOCK:
        _LOADED[cache_file()] = {}
        with suppress(OSError):
            cache_file().unlink(missing_ok=True)


def prefer(op: str, backend: str) -> None:
    """Let `auto` take one backend for an op wherever it can run, whatever was measured.

    Args:
        op: the op's name.
        backend: the backend's name.

    Raises:
        InputError: the cache folder cannot be written.
    """
    with _LOCK:
        _table()[op] = {"backend": backend}
        _save()


def shape_class(inputs: Sequence[Any]) -> str:
    """Describe inputs up to factors of two, so that near shapes share one measurement.

    Args:
        inputs: tensors, and None for those that are not given.

    Returns:
        Such as "bfloat16[4096,1024] float32[1,1024,1024]".
    """
    parts = []
    for x in inputs:
        if x is None:
            parts.append("-")
        else:
            sizes = ",".join(str(1 << (n - 1).bit_length() if n else 0) for n in x.shape)
            parts.append(f"{str(x.dtype).removeprefix('torch.')}[{sizes}]")
    return " ".join(parts)


def preferred(op: str) -> str | None:
    """Look up a person's choice.

    Args:
        op: the op's name.

    Returns:
        The preferred backend's name, or None.
    """
    with _LOCK:
        return _table().get(op, {}).get("backend")


def fastest(
    op: str,
    device: str,
    inputs: Sequence[Any],
    calls: Mapping[str, Callable[[], Any]],
    clock: Callable[[Callable[[], Any]], float],
) -> str:
    """Give the fastest backend for inputs of this kind, and measure where that is not known.

    Args:
        op: the op's name.
        device: the device's name, as in "NVIDIA H100 80GB HBM3".
        inputs: tensors whose dtypes and shapes make the class.
        calls: backend -> the op on these inputs; a call that raises is out of the race.
        clock: runs a call and gives its milliseconds.

    Returns:
        The backend's name.
    """
    key = f"{op} | {device} | {shape_class(inputs)}"
    with _LOCK:
        known = _table().get(key, {}).get("backend")
    if known is not None and known in calls:
        return known
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS + 1):
        for name in list(times):
            try:
                spent = clock(calls[name])
            except Exception:
                # a backend that breaks here would break the score too; `auto` is free to take another one
                del times[name]
                continue
            if turn:  # the first call compiles and tunes
                times[name].append(spent)
    if not times:
        return next(iter(calls))
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min(medians, key=lambda name: medians[name])
    with _LOCK:
        _table()[key] = {"backend": best, "milliseconds": {name: round(ms, 5) for name, ms in medians.items()}}
        with suppress(InputError):  # a cache that cannot be kept is measured again next time
            _save()
    return best


def gpu_milliseconds(call: Callable[[], Any]) -> float:
    """Time one call on the current GPU.

    Args:
        call: what to run.

    Returns:
        Milliseconds between two events around it on the current stream.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _versions() -> dict[str, str]:
    """What a measurement depends on besides its key: another version may be faster or slower."""
    found = {"torch": str(torch.__version__)}
    for name in ("triton", "gradshield_fast"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _table() -> Table:
    """The table of the current cache file; empty where that is absent, broken or of other versions."""
    path = cache_file()
    if path not in _LOADED:
        _LOADED[path] = {}
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            stored = json.loads(path.read_text(encoding="utf-8"))
            current = stored["versions"] == _versions()
            entries = {k: dict(v) for k, v in stored["entries"].items() if current or " | " not in k}
            _LOADED[path] = {k: v for k, v in entries.items() if isinstance(v.get("backend"), str)}
    return _LOADED[path]


def _save() -> None:
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the cache folder {path.parent}: {error.strerror}") from error
    write_whole(path, json.dumps({"versions": _versions(), "entries": _table()}, indent=1).encode())
