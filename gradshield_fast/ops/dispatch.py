"""Choosing a backend for an op: `auto` takes the first that can run, a named one that cannot raises with its reason.

A room's module has the op's functions, `why_not(*inputs)`, which says why it cannot run (None: it can), and, where it
can run without being worth it, `not_for_auto(*inputs)`, which says why `auto` should pass it by. On a GPU `auto` times
those that are left, once for a class of shapes (measured.py); on a CPU it does so where a module's `contested(*inputs)`
says that one processor's answer was not another's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch

from gradshield_fast.errors import BackendUnavailable, InputError
from gradshield_fast.ops import measured

KNOWN_BACKENDS = ("native", "triton", "reference")
"""Every backend name that the package knows, in the order `auto` prefers them."""

_ROOMS: dict[str, Mapping[str, ModuleType]] = {}
_LISTENERS: list[dict[str, set[str]]] = []
_CHOSEN: dict[tuple[Any, ...], str] = {}
"""What `auto` took on a GPU, for inputs of exactly these shapes: looking up what was measured takes longer than most
launches."""
CHOSEN_MOST = 4096


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


def room(op: str) -> Mapping[str, ModuleType]:
    """Look up an op's backends.

    Args:
        op: the op's name.

    Returns:
        Name -> module, as they were registered.
    """
    return _ROOMS[op]


def run(op: str, backend: str, function: str, inputs: Sequence[Any], *args: Any) -> Any:
    """Run one of an op's functions on the backend that suits its inputs, and tell those who listen (`record`).

    Args:
        op: the op's name.
        backend: "auto", or one of `KNOWN_BACKENDS`.
        function: the function's name, the same in every backend of the room.
        inputs: the tensors that `why_not` looks at.
        args: the function's arguments.

    Returns:
        What the function returns.

    Raises:
        BackendUnavailable: the named backend cannot run these inputs.
    """
    room = _ROOMS[op]
    name = _auto(op, room, function, inputs, args) if backend == "auto" else _named(op, backend, inputs)
    for seen in _LISTENERS:
        seen.setdefault(op, set()).add(name)
    return getattr(room[name], function)(*args)


def _auto(op: str, room: Mapping[str, ModuleType], function: str, inputs: Sequence[Any], args: tuple[Any, ...]) -> str:
    first = next((x for x in inputs if x is not None), None)
    if first is None or first.device.type != "cuda":
        return _choose(op, room, function, inputs, args)
    key = (op, function, measured.stamp(), measured.signature(inputs))
    name = _CHOSEN.get(key)
    if name is None or name not in room:
        name = _choose(op, room, function, inputs, args)
        if not torch.cuda.is_current_stream_capturing():  # while a graph is captured nothing is measured
            if len(_CHOSEN) >= CHOSEN_MOST:
                _CHOSEN.clear()
            _CHOSEN[key] = name
    return name


def _choose(
    op: str, room: Mapping[str, ModuleType], function: str, inputs: Sequence[Any], args: tuple[Any, ...]
) -> str:
    choice = measured.preferred(op)
    if choice is not None and choice in room and room[choice].why_not(*inputs) is None:
        return choice
    device = next((x.device for x in inputs if x is not None), None)
    races = device is not None and _races(room, device, inputs)
    worth, able = [], []
    for name, module in room.items():
        if module.why_not(*inputs) is None:
            able.append(name)
            if _not_for_auto(module, *inputs) is None:
                if not races:
                    return name
                worth.append(name)
    if not able:
        reasons = "; ".join(f"{name}: {module.why_not(*inputs)}" for name, module in room.items())
        raise BackendUnavailable(f"{op}: no backend can run these inputs ({reasons})")
    if len(worth) < 2 or device is None:
        return (worth or able)[0]
    calls = {name: partial(getattr(room[name], function), *args) for name in worth}
    if device.type == "cpu":
        clock = measured.cpu_milliseconds
        return measured.fastest(f"{op}.{function}", measured.processor(), inputs, calls, clock, alike=worth[:1])
    with torch.cuda.device(device):
        about = torch.cuda.get_device_name(device)
        return measured.fastest(f"{op}.{function}", about, inputs, calls, measured.gpu_milliseconds)


def _races(room: Mapping[str, ModuleType], device: torch.device, inputs: Sequence[Any]) -> bool:
    if device.type == "cuda":
        return not torch.cuda.is_current_stream_capturing()
    return any(
        module.contested(*inputs)
        for module in room.values()
        if hasattr(module, "contested") and module.why_not(*inputs) is None
    )


def why_not(op: str, backend: str, *inputs: Any) -> str | None:
    """Say why a backend cannot run an op on these inputs.

    Args:
        op: the op's name.
        backend: the backend's name.
        inputs: the op's tensors; one small tensor on a device stands for what depends on the device alone.

    Returns:
        The reason, or None where it can.

    Raises:
        BackendUnavailable: the op has no such backend.
    """
    resolve(op, backend)
    return _ROOMS[op][backend].why_not(*inputs)


def _named(op: str, backend: str, inputs: Sequence[Any]) -> str:
    reason = why_not(op, backend, *inputs)
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
    check_name(backend, op)
    room = _ROOMS[op]
    if backend == "auto":
        return next(iter(room))
    if backend not in room:
        raise BackendUnavailable(f"{op}: backend '{backend}' is not built in this version; there is: {', '.join(room)}")
    return backend


def check_name(backend: str, op: str | None = None) -> None:
    """Refuse a backend name that does not exist.

    Args:
        backend: what the user asked for.
        op: the op it was asked for, for the message; None: for all of them.

    Raises:
        InputError: it is neither "auto" nor one of `KNOWN_BACKENDS`.
    """
    if backend != "auto" and backend not in KNOWN_BACKENDS:
        about = "" if op is None else f"{op}: "
        raise InputError(f"{about}backend must be one of auto, {', '.join(KNOWN_BACKENDS)}; got {backend!r}")


def available() -> dict[str, tuple[str, ...]]:
    """List what is built: op name -> its backends, most preferred first.

    Returns:
        One entry for each op.
    """
    return {op: tuple(room) for op, room in sorted(_ROOMS.items())}
