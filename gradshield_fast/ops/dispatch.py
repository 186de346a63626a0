"""Choosing a backend for an op: `auto` takes the first that can run, a named one that cannot raises with its reason.

A room's module has the op's functions, `why_not(*inputs)`, which says why it cannot run (None: it can), and, where it
can run without being worth it, `not_for_auto(*inputs)`, which says why `auto` should pass it by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from gradshield_fast.errors import BackendUnavailable, InputError

KNOWN_BACKENDS = ("native", "triton", "reference")
"""Every backend name that the package knows, in the order `auto` prefers them."""

_ROOMS: dict[str, Mapping[str, ModuleType]] = {}
_LISTENERS: list[dict[str, set[str]]] = []


def register(op: str, backends: Mapping[str, ModuleType]) -> Mapping[str, ModuleType]:
    """Enter an op and its backends, most preferred first, in the table that `available` shows.

    Args:
        op: the op's name, which is its folder's name.
        backends: name -> module with `why_not(*inputs)` and the op itself.

    Returns:
        `backends`, so that a room can keep what it registered.
    """
    _ROOMS[op] = backends
    return backends


def pick(op: str, backend: str, *inputs: Any) -> ModuleType:
    """Choose the backend that will run `op` on `inputs`, and tell those who listen (`record`).

    Args:
        op: the op's name.
        backend: "auto", or one of `KNOWN_BACKENDS`.
        inputs: the op's tensors, which `why_not` looks at.

    Returns:
        The backend's module.

    Raises:
        BackendUnavailable: the named backend cannot run these inputs.
    """
    room = _ROOMS[op]
    name = _auto(op, room, inputs) if backend == "auto" else _named(op, room, backend, inputs)
    for seen in _LISTENERS:
        seen.setdefault(op, set()).add(name)
    return room[name]


def _auto(op: str, room: Mapping[str, ModuleType], inputs: tuple[Any, ...]) -> str:
    able = [name for name, module in room.items() if module.why_not(*inputs) is None]
    if not able:
        reasons = "; ".join(f"{name}: {module.why_not(*inputs)}" for name, module in room.items())
        raise BackendUnavailable(f"{op}: no backend can run these inputs ({reasons})")
    worth = [name for name in able if _not_for_auto(room[name], *inputs) is None]
    return (worth or able)[0]


def _named(op: str, room: Mapping[str, ModuleType], backend: str, inputs: tuple[Any, ...]) -> str:
    resolve(op, backend)
    reason = room[backend].why_not(*inputs)
    if reason is not None:
        raise BackendUnavailable(f"{op}: backend '{backend}' cannot run these inputs: {reason}")
    return backend


@contextmanager
def record() -> Iterator[dict[str, set[str]]]:
    """Note which backends run inside the scope, in any thread: a GPU's backward pass has a thread of its own.

    Yields:
        Op's name -> backends that ran it so far.
    """
    seen: dict[str, set[str]] = {}
    _LISTENERS.append(seen)
    try:
        yield seen
    finally:
        # by identity: two records with the same content are equal
        _LISTENERS[:] = [other for other in _LISTENERS if other is not seen]


def _not_for_auto(module: ModuleType, *inputs: Any) -> str | None:
    return module.not_for_auto(*inputs) if hasattr(module, "not_for_auto") else None


def resolve(op: str, backend: str) -> str:
    """Name the backend that an op prefers under a choice, before any inputs are known.

    Args:
        op: the op's name.
        backend: "auto", or one of `KNOWN_BACKENDS`.

    Returns:
        The backend's name.

    Raises:
        InputError: no backend has that name.
        BackendUnavailable: the named backend is not built.
    """
    check_name(backend)
    room = _ROOMS[op]
    if backend == "auto":
        return next(iter(room))
    if backend not in room:
        raise BackendUnavailable(f"{op}: backend '{backend}' is not built in this version; there is: {', '.join(room)}")
    return backend


def check_name(backend: str) -> None:
    """Refuse a backend name that does not exist.

    Args:
        backend: what the user asked for.

    Raises:
        InputError: it is neither "auto" nor one of `KNOWN_BACKENDS`.
    """
    if backend != "auto" and backend not in KNOWN_BACKENDS:
        raise InputError(f"backend must be one of auto, {', '.join(KNOWN_BACKENDS)}; got {backend!r}")


def available() -> dict[str, tuple[str, ...]]:
    """List what is built: op name -> its backends, most preferred first.

    Returns:
        One entry for each op.
    """
    return {op: tuple(room) for op, room in sorted(_ROOMS.items())}
