"""Units -> parts on the machines of a Ray cluster: one actor for each GPU, or for each slot of CPUs.

An actor reads the corpus, the model and the run's folder, which every machine must see under the same paths. It gives
its parts back to this process, which alone writes them. A unit whose actor or machine was lost is handed out again.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gradshield_fast import storage
from gradshield_fast.errors import GradShieldError, InputError, ScoringError
from gradshield_fast.heap import keep_freed_memory
from gradshield_fast.pipeline.encoding import pick_workers
from gradshield_fast.pipeline.folder import RunFolder
from gradshield_fast.pipeline.manifest import read_manifest
from gradshield_fast.pipeline.options import RunOptions
from gradshield_fast.pipeline.progress import Reporter
from gradshield_fast.pipeline.sessions import Timing
from gradshield_fast.pipeline.units import Unit
from gradshield_fast.pipeline.worker import Task, Worker

LOSSES = 3
"""A unit whose actor was lost as often stops the run: it is the unit that does it."""

_LOOK_SECONDS = 2.0


class Actor:
    """A worker behind Ray."""

    def __init__(self, options: RunOptions, workers: int) -> None:
        """Take what it is to work on; nothing heavy, so that errors come from `open`.

        Args:
            options: what was asked for.
            workers: processes that encode ahead.
        """
        self._options, self._workers = options, workers
        self._worker: Worker | None = None

    def open(self) -> None:
        """Load the model, and make the direction if nobody has.

        Raises:
            InputError: the folder of the run is not to be seen here.
        """
        keep_freed_memory()
        folder = RunFolder(self._options.out)
        manifest = read_manifest(folder)
        if manifest is None:
            raise InputError(
                f"{folder.manifest} is not to be seen on {socket.gethostname()}: --engine ray needs the corpus, the "
                "model and the output folder under the same paths on all machines"
            )
        self._worker = Worker(folder, manifest, self._options, Reporter(), self._workers).__enter__()

    def score(self, unit: Unit, upcoming: list[Unit]) -> tuple[bytes, Timing, dict[str, Any]]:
        """Score a unit.

        Args:
            unit: which.
            upcoming: what comes next.

        Returns:
            The bytes of its part, how long it took, and how rows are scored.
        """
        assert self._worker is not None
        content, timing = self._worker.score(unit, upcoming)
        name = f"{socket.gethostname()}:{os.getpid()}"
        return content, replace(timing, worker=name), self._worker.describe()


def scored_by_ray(task: Task) -> Iterator[tuple[bytes, Timing]]:
    """Score units on a Ray cluster: the one this process is connected to, the one that runs here, or a new one.

    Args:
        task: which, and with what.

    Yields:
        The bytes of each unit's part, and how long it took, in the order in which they are ready.

    Raises:
        InputError: Ray is not installed, or the cluster has no room for an actor.
        ScoringError: a unit lost its actor too often.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError("--engine ray needs Ray: pip install 'gradshield_fast[ray]'") from error
    connected = ray.is_initialized()
    if not connected:
        ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    try:
        yield from _Crew(ray, task).results()
    finally:
        if not connected:
            ray.shutdown()


@dataclass
class _Member:
    """An actor, the unit that it works on, and the one that it has been told of."""

    handle: Any
    doing: Unit | None = None
    next: deque[Unit] = field(default_factory=deque)


class _Crew:
    """The actors and the units that are left for them."""

    def __init__(self, ray: Any, task: Task) -> None:
        self._ray, self._task = ray, task
        self._left = deque(task.units)
        self._lost: Counter[int] = Counter()
        self._pending: dict[Any, _Member] = {}
        self._device = task.options.model.device
        self._needs = self._needed(ray.cluster_resources())
        engine = task.options.engine
        self._workers = pick_workers(engine.workers, len(task.units), "num_gpus" in self._needs)
        self._ahead = min(self._workers, 2)
        options = replace(
            task.options,
            out=task.options.out.absolute(),
            corpus=replace(task.options.corpus, path=storage.absolute(task.options.corpus.path)),
        )
        self._shared = ray.put(options)

    def _needed(self, there: Mapping[str, float]) -> dict[str, float]:
        """Say what one actor takes."""
        if self._device.startswith("cuda:"):
            raise InputError("--engine ray gives each actor a GPU of its own: name the device cuda or auto")
        threads = self._task.options.engine.threads or 1
        if self._device == "cuda" or (self._device == "auto" and there.get("GPU", 0) >= 1):
            return {"num_gpus": 1, "num_cpus": min(threads, there.get("CPU", 0))}
        return {"num_cpus": threads}

    def _room(self) -> int:
        """Say how many actors the cluster can hold now; machines may come and go."""
        there = self._ray.cluster_resources()
        names = {"num_gpus": "GPU", "num_cpus": "CPU"}
        most = [int(there.get(names[kind], 0) // count) for kind, count in self._needs.items() if count]
        return min([*most, self._task.options.engine.actors or max(most, default=0)])

    def results(self) -> Iterator[tuple[bytes, Timing]]:
        ray, task = self._ray, self._task
        if self._room() < 1:
            raise InputError(f"the Ray cluster has no room for an actor, which takes {self._needs}")
        # one alone at first: it makes what the others are to share
        self._add()
        begun = False
        while self._left or any(member.doing for member in self._pending.values()):
            ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=_LOOK_SECONDS)
            for reference in ready:
                member = self._pending.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise _own(error) from error
                except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                    self._take_back(member, error)
                    continue
                member.doing = None
                if result is None:
                    if not begun:
                        task.begin()
                    begun = True
                else:
                    content, timing, task.outcome["scorer"] = result
                    task.reporter.advance(timing.rows, timing.tokens)
                    yield content, timing
                self._give(member)
            # one at least, which Ray starts once there is room; one alone until the first has begun
            wanted = max(1, min(self._room(), len(self._left))) if begun else 1
            while self._left and len(self._pending) < wanted:
                self._add()
        for member in self._pending.values():
            ray.kill(member.handle)

    def _add(self) -> None:
        actor = self._ray.remote(**self._needs)(Actor)
        member = _Member(actor.remote(self._shared, self._workers))
        self._pending[member.handle.open.remote()] = member

    def _give(self, member: _Member) -> None:
        """Hand an actor its next unit; one without any is let go."""
        if not member.next and self._left:
            member.next.append(self._left.popleft())
        if not member.next:
            self._ray.kill(member.handle)
            return
        member.doing = member.next.popleft()
        # the last units are not promised to an actor that may be slow
        while len(member.next) < self._ahead and len(self._left) > len(self._pending):
            member.next.append(self._left.popleft())
        self._pending[member.handle.score.remote(member.doing, list(member.next))] = member

    def _take_back(self, member: _Member, error: Exception) -> None:
        """Take back the units of an actor that was lost."""
        if member.doing is None:
            key, what = -1, "an actor was lost while it loaded the model"
        else:
            unit = member.doing
            key, what = unit.number, f"the actor of unit {unit.number} (rows from {unit.first}) was lost"
        self._lost[key] += 1
        self._left.extendleft(reversed([unit for unit in (member.doing, *member.next) if unit is not None]))
        reason = str(error).strip().split("\n")[0][:200]
        if self._lost[key] >= LOSSES:
            raise ScoringError(f"{what} {LOSSES} times: {reason}; run the same command again to go on")
        self._task.reporter.note(f"{what}; it is handed out again ({reason})")


def _own(error: Any) -> BaseException:
    """Give the error that a worker raised, as if it had been raised here."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, GradShieldError) else ScoringError(f"a worker failed: {cause or error}")
