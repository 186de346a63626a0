"""Which backend, or tiling of a kernel, was fastest: measured once for a device and a class of shapes, kept on disk.

On a GPU `auto` and the Triton kernels ask here. On a CPU the order of a room and its modules' `not_for_auto` decide,
except where `contested` says that processors differ: there `auto` asks too. What one process has kept counts for all
that share the file, until it is cleared: two runs give the same bits.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gradshield_fast.errors import InputError
from gradshield_fast.files import write_whole

ROUNDS = 5
"""Timed calls of each backend, in turns; the fastest counts, since what else runs on a machine only ever adds."""

Table = dict[str, dict[str, Any]]

_LOCK = threading.Lock()
_LOADED: dict[Path, Table] = {}
_CHANGES = 0
"""How often this process has cleared the table or preferred a backend."""


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
        "op | device | shapes" -> {"backend", "milliseconds": {backend: least}}, or the same of a kernel and its
        tilings; "op" -> {"backend"} where a person preferred one.
    """
    with _LOCK:
        return {key: dict(entry) for key, entry in _table().items()}


def clear() -> None:
    """Forget every measurement and preference, on disk too."""
    global _CHANGES
    with _LOCK:
        _CHANGES += 1
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
    global _CHANGES
    with _LOCK, _alone(cache_file()):
        _CHANGES += 1
        stored = _read(cache_file())
        stored[op] = {"backend": backend}
        _save(stored)
        _table().update(stored)


def stamp() -> tuple[int, str | None]:
    """Say by which table choices are made now, for those that keep a choice in memory.

    Returns:
        A value that differs once a choice may.
    """
    return _CHANGES, os.environ.get("XDG_CACHE_HOME")


def signature(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Describe inputs exactly, cheaply: what is asked once a layer must not cost more than the layer's launch.

    Args:
        inputs: tensors, and None for those that are not given.

    Returns:
        Something hashable that tells dtype, shape and device.
    """
    return tuple(None if x is None else (x.dtype, x.shape, x.device) for x in inputs)


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


def known(op: str, device: str, inputs: Sequence[Any]) -> str | None:
    """Look up what was fastest, without measuring.

    Args:
        op: as in `fastest`.
        device: as in `fastest`.
        inputs: as in `fastest`.

    Returns:
        The name, or None where it was not measured.
    """
    with _LOCK:
        return _table().get(_key(op, device, inputs), {}).get("backend")


def fastest(
    op: str,
    device: str,
    inputs: Sequence[Any],
    calls: Mapping[str, Callable[[], Any]],
    clock: Callable[[Callable[[], Any]], float],
    *,
    alike: Collection[str] | None = None,
    gain: float = 0.0,
) -> str:
    """Give the fastest backend or tiling for inputs of this kind, and measure where that is not known.

    Args:
        op: the op's name, or the kernel's.
        device: the device's name, as in "NVIDIA H100 80GB HBM3".
        inputs: tensors whose dtypes and shapes make the class.
        calls: name -> the op on these inputs; a call that raises is out of the race.
        clock: runs a call and gives its milliseconds.
        alike: names that may be taken where the answer cannot be kept on disk; None: all.
        gain: share of the first one's time that another must save to be taken in its place.

    Returns:
        The name.
    """
    key = _key(op, device, inputs)
    found = known(op, device, inputs)
    if found is not None and found in calls:
        return found
    fastest_of = _race(calls, clock)
    if not fastest_of:
        return next(iter(calls))
    with _LOCK:
        try:
            return _keep(key, _entry(fastest_of, calls, gain), calls)
        except InputError:  # it is measured again next time
            least = {name: ms for name, ms in fastest_of.items() if alike is None or name in alike} or fastest_of
            _table()[key] = _entry(least, calls, gain)
            return _table()[key]["backend"]


def _key(op: str, device: str, inputs: Sequence[Any]) -> str:
    return f"{op} | {device} | {shape_class(inputs)}"


def _race(calls: Mapping[str, Callable[[], Any]], clock: Callable[[Callable[[], Any]], float]) -> dict[str, float]:
    """Time calls in turns; the least of each that does not raise."""
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
    return {name: min(values) for name, values in times.items()}


def _entry(fastest_of: Mapping[str, float], calls: Mapping[str, Any], gain: float) -> dict[str, Any]:
    """What is kept of a race. A gain below `gain` is noise: the first of the calls stays."""
    best, first = min(fastest_of, key=lambda name: fastest_of[name]), next(iter(calls))
    if first in fastest_of and fastest_of[best] > (1 - gain) * fastest_of[first]:
        best = first
    return {"backend": best, "milliseconds": {name: round(ms, 5) for name, ms in fastest_of.items()}}


def _keep(key: str, entry: dict[str, Any], calls: Mapping[str, Any]) -> str:
    """Keep an entry unless another process kept one first: two workers that differ would differ in their last bits."""
    path = cache_file()
    with _alone(path):
        stored = _read(path)
        if stored.get(key, {}).get("backend") not in calls:
            stored[key] = entry
            _save(stored)
    _table().update(stored)
    return stored[key]["backend"]


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


def cpu_milliseconds(call: Callable[[], Any]) -> float:
    """Time one call on the CPU.

    Args:
        call: what to run.

    Returns:
        Milliseconds on the wall.
    """
    begun = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begun)


@cache
def processor() -> str:
    """Name this machine's processor; not its number of threads, with which an answer, and so bits, would change.

    Returns:
        The model's name where the system tells it, and the instruction set that torch found.
    """
    name = platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _versions() -> dict[str, str]:
    """What a measurement depends on besides its key: another version may be faster or slower."""
    found = {"torch": str(torch.__version__)}
    for name in ("triton", "gradshield_fast"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _table() -> Table:
    """The table of the current cache file, as this process knows it."""
    path = cache_file()
    if path not in _LOADED:
        _LOADED[path] = _read(path)
    return _LOADED[path]


def _read(path: Path) -> Table:
    """The table on disk; empty where that is absent, broken or of other versions."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        stored = json.loads(path.read_text(encoding="utf-8"))
        current = stored["versions"] == _versions()
        entries = {k: dict(v) for k, v in stored["entries"].items() if current or " | " not in k}
        return {k: v for k, v in entries.items() if isinstance(v.get("backend"), str)}
    return {}


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the cache file against other processes, where the system can."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_suffix(".lock"), "w", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        raise InputError(f"cannot make the cache folder {path.parent}: {error.strerror}") from error
    with lock:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _save(table: Table) -> None:
    write_whole(cache_file(), json.dumps({"versions": _versions(), "entries": table}, indent=1).encode())
