"""Choosing a backend for an op: `auto` takes the first that can run, a named one that cannot raises with its reason.

A room's module has the op's functions, `why_not(*inputs)`, which says why it cannot run (None: it can), and, where it
can run without being worth it, `not_for_auto(*inputs)`, which says why `auto` should pass it by.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from gradshield_fast.errors import BackendUnavailable, InputError

KNOWN_BACKENDS = ("native", "triton", "reference")
"""Every backend name that the package knows, in the order `auto` prefers them."""

_ROOMS: dict[str, Mapping[str, ModuleType]] = {}


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


def pick(op: str, backend: str, *inputs: Any) -> tuple[str, ModuleType]:
    """Choose the backend that will run `op` on `inputs`.

    Args:
        op: the op's name.
        backend: "auto", or one of `KNOWN_BACKENDS`.
        inputs: the op's tensors, which `why_not` looks at.

    Returns:
        The backend's name and its module.

    Raises:
        BackendUnavailable: the named backend cannot run these inputs.
    """
    room = _ROOMS[op]
    if backend == "auto":
        for name, module in room.items():
            if module.why_not(*inputs) is None and _not_for_auto(module, *inputs) is None:
                return name, module
        reasons = "; ".join(f"{name}: {module.why_not(*inputs)}" for name, module in room.items())
        raise BackendUnavailable(f"{op}: no backend can run these inputs ({reasons})")
    resolve(op, backend)
    reason = room[backend].why_not(*inputs)
    if reason is not None:
        raise BackendUnavailable(f"{op}: backend '{backend}' cannot run these inputs: {reason}")
    return backend, room[backend]


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
