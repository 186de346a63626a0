"""Units -> tokens, ahead of the scorer: in worker processes, or in this one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from gradshield_fast.chat import ChatEncoder, Encoded
from gradshield_fast.corpus import Row
from gradshield_fast.errors import InputError, ScoringError
from gradshield_fast.loading import load_tokenizer
from gradshield_fast.pipeline.duplicate_rows import DUPLICATE
from gradshield_fast.pipeline.options import CorpusOptions, ModelOptions
from gradshield_fast.pipeline.units import Unit, UnitReader


@dataclass
class EncodedUnit:
    """The rows of a unit as the model sees them, in few large arrays: they cross from one process to another.

    Attributes:
        id: the rows' own ids.
        status: as `Encoded.status`.
        reason: as `Encoded.reason`.
        tokens: int32 [rows].
        response_tokens: int32 [rows].
        input_ids: int32 [all tokens], row after row.
        labels: int32 [all tokens].
        same_as: int64 [rows], the earlier row whose score is this one's too; -1 where there is none.
    """

    id: list[str]
    status: list[str]
    reason: list[str]
    tokens: np.ndarray
    response_tokens: np.ndarray
    input_ids: np.ndarray
    labels: np.ndarray
    same_as: np.ndarray

    @classmethod
    def of(cls, ids: list[str], rows: Sequence[Encoded], same_as: np.ndarray) -> EncodedUnit:
        """Put rows together.

        Args:
            ids: their ids.
            rows: the rows.
            same_as: as the attribute.

        Returns:
            The unit.
        """
        return cls(
            id=ids,
            status=[row.status for row in rows],
            reason=[row.reason for row in rows],
            tokens=np.array([len(row.input_ids) for row in rows], dtype=np.int32),
            response_tokens=np.array([row.response_tokens for row in rows], dtype=np.int32),
            input_ids=_flat([row.input_ids for row in rows]),
            labels=_flat([row.labels for row in rows]),
            same_as=same_as,
        )

    def rows(self) -> list[Encoded]:
        """Take the rows apart again.

        Returns:
            A row for each, but for its notes.
        """
        ends = np.cumsum(self.tokens)
        return [
            Encoded(self.input_ids[a:b].tolist(), self.labels[a:b].tolist(), int(learnt), status, reason)
            for a, b, learnt, status, reason in zip(
                ends - self.tokens, ends, self.response_tokens, self.status, self.reason, strict=True
            )
        ]


def encode_row(row: Row, encoder: ChatEncoder) -> Encoded:
    """Encode a row of a corpus, whatever its status.

    Args:
        row: the row.
        encoder: turns a conversation into tokens.

    Returns:
        Its tokens; for a row that could not be read, none, and the row's own status and reason.
    """
    if row.messages is None:
        return Encoded([], [], 0, row.status, row.reason)
    return encoder.encode(row.messages)


def encode_unit(unit: Unit, reader: UnitReader, encoder: ChatEncoder) -> EncodedUnit:
    """Read and encode a unit.

    Args:
        unit: which.
        reader: of its corpus.
        encoder: turns a conversation into tokens.

    Returns:
        Its rows.
    """
    ids, rows, first = [], [], reader.first(unit)
    same_as = np.where(first < np.arange(unit.first, unit.first + unit.rows), first, -1)
    for row, other in zip(reader.rows(unit), same_as.tolist(), strict=True):
        ids.append(row.id)
        rows.append(encode_row(row, encoder) if other < 0 else Encoded([], [], 0, DUPLICATE))
    return EncodedUnit.of(ids, rows, same_as)


class Encoding:
    """Gives units encoded, in any order; those that are asked for next are worked on meanwhile.

    Use as a context manager. What it gives does not depend on the number of workers.

    Attributes:
        waited: seconds that `take` took in all.
    """

    def __init__(
        self,
        corpus: CorpusOptions,
        model: ModelOptions,
        encoder: ChatEncoder,
        workers: int,
        duplicates: Path | None = None,
    ) -> None:
        """Take what a worker needs.

        Args:
            corpus: which rows.
            model: whose tokenizer.
            encoder: the encoder of this process; the workers' must be the same.
            workers: processes; 0: none, each unit is encoded when it is taken.
            duplicates: as for `UnitReader`.
        """
        self._reader, self._encoder, self._workers = UnitReader(corpus, duplicates), encoder, workers
        self._ahead: dict[int, Future[EncodedUnit]] = {}
        self._pool: ProcessPoolExecutor | None = None
        if workers:
            self._pool = ProcessPoolExecutor(
                workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(corpus, model, encoder.max_length, encoder.template, encoder.describe(), duplicates),
            )
        self.waited = 0.0

    def __enter__(self) -> Encoding:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def depth(self) -> int:
        """How many units are worthwhile to be named ahead: it bounds what is held."""
        return 2 * self._workers + 1

    def begin(self, upcoming: Sequence[Unit]) -> None:
        """Begin to encode units.

        Args:
            upcoming: what will be asked for; the first `depth` of them are begun.
        """
        if self._pool is None:
            return
        for unit in upcoming[: self.depth]:
            if unit.number not in self._ahead:
                with _no_interrupt():
                    self._ahead[unit.number] = self._pool.submit(_encode, unit)

    def take(self, unit: Unit, upcoming: Sequence[Unit] = ()) -> EncodedUnit:
        """Give a unit's rows.

        Args:
            unit: which.
            upcoming: what will be asked for next; the first `depth` of them are begun.

        Returns:
            Its rows.

        Raises:
            InputError: the corpus has changed, or cannot be read.
            ScoringError: a worker died.
        """
        begun = time.perf_counter()
        try:
            if self._pool is None:
                return encode_unit(unit, self._reader, self._encoder)
            try:
                self.begin([unit, *upcoming])
                return self._ahead.pop(unit.number).result()
            except BrokenProcessPool as error:
                raise ScoringError(
                    "a process that reads and encodes rows ahead died (killed, out of memory, or a script without "
                    "`if __name__ == '__main__'`); run the same command again, with fewer --workers if need be"
                ) from error
        finally:
            self.waited += time.perf_counter() - begun


def pick_workers(wanted: int | None, units: int, on_gpu: bool) -> int:
    """Choose how many processes encode ahead of a scorer.

    Args:
        wanted: what was asked for; None: it is up to us.
        units: how many there are to score.
        on_gpu: whether the scorer leaves the CPU to others.

    Returns:
        The number; 0 where starting a process would take longer than it saves.
    """
    if wanted is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        wanted = min(8, max(1, cores - 1)) if on_gpu else min(2, cores // 2)
        return wanted if units > 8 else 0
    return wanted if units > 1 else 0


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Let a process that is started here begin without Ctrl-C, which is for its parent alone.

    The signal is held back, not ignored: one that comes meanwhile interrupts the parent when this ends.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker: tuple[UnitReader, ChatEncoder] | Exception


def _begin(
    corpus: CorpusOptions,
    model: ModelOptions,
    max_length: int | None,
    template: str,
    described: dict[str, Any],
    duplicates: Path | None,
) -> None:
    """Begin a worker process, which does not outlive its parent; what goes wrong is told with the first unit."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    try:
        tokenizer = load_tokenizer(model.name, trust_remote_code=model.trust_remote_code)
        encoder = ChatEncoder(tokenizer, max_length=max_length, template=template)
        differ = sorted(key for key, value in encoder.describe().items() if value != described[key])
        if set(differ) - {"template_kind"}:
            raise InputError(f"the tokenizer of {model.name} differs in another process: {', '.join(differ)}")
        _worker = (UnitReader(corpus, duplicates), encoder)
    except Exception as error:
        _worker = error


def _encode(unit: Unit) -> EncodedUnit:
    if isinstance(_worker, Exception):
        raise _worker
    return encode_unit(unit, *_worker)


def _flat(rows: Sequence[list[int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype=np.int32)
