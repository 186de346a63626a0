"""A peer in a process of its own: JSON lines in, one JSON line out for each.

    {"do": "load", "peer": "module:Class", "work": FOLDER, "dtype": "float32", "threads": 2}
    {"do": "score", "batch_tokens": 1024, "first": 16, "out": FILE}     "first": null scores every row

An answer holds "error" (one line) and "trace", or what was asked for: after "load" the weights covered and the batch
sizes to try, after "score" the seconds and the memory, with the scores in the file. What a peer prints goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.workload import PeakMemory, batches_of, open_model, synchronize
from gradshield_fast import Direction
from gradshield_fast.chat import Encoded
from gradshield_fast.packing import Batch


def read_work(folder: Path) -> tuple[dict[str, Any], list[Encoded]]:
    """Read the rows that every peer scores.

    Args:
        folder: the work folder.

    Returns:
        What the work is, and its rows.
    """
    work = json.loads((folder / "work.json").read_text())
    rows = [Encoded(ids, labels, sum(x != -100 for x in labels), "ok") for ids, labels in work["rows"]]
    return work, rows


def pick(rows: list[Encoded], count: int | None) -> list[Encoded]:
    """Take some rows, spread evenly over the files they came from.

    Args:
        rows: all rows.
        count: how many, or None for all.

    Returns:
        The rows.
    """
    return rows if count is None else [rows[i * len(rows) // count] for i in range(min(count, len(rows)))]


class Worker:
    """Answers the commands of one process."""

    def load(self, peer: str, work: str, dtype: str, threads: int | None) -> dict[str, Any]:
        """Load the model and the direction, and make the peer.

        Args:
            peer: its class, as "module:Class".
            work: the work folder.
            dtype: type of the model's weights.
            threads: threads of torch, or None for its own choice.

        Returns:
            What the peer covers, the batch sizes to try, and versions.
        """
        folder = Path(work)
        about, self.rows = read_work(folder)
        model, _ = open_model(about["model"], dtype, threads)
        direction = Direction.load(folder / "direction.safetensors")
        direction.meta.pop("model", None)  # it was made on the float32 weights, and these may be their rounded copy
        module, _, name = peer.partition(":")
        self.peer = getattr(importlib.import_module(module), name)(model, direction)
        return {"covers": self.peer.covers, "batch_tokens": list(self.peer.batch_tokens)}

    def score(self, batch_tokens: int, first: int | None, out: str) -> dict[str, Any]:
        """Warm up on the smallest batch, then score and time.

        Args:
            batch_tokens: bound on a batch's tokens.
            first: how many rows, or None for all.
            out: where the scores go.

        Returns:
            Seconds, of the clock and of the CPU (much less than threads * seconds: others were running), memory in
            MiB, and what the peer says of itself.
        """
        batches: list[Batch] = batches_of(pick(self.rows, first), batch_tokens)
        smallest = min(batches, key=lambda batch: batch.input_ids.size)
        self.peer.score(self.peer.prepare([smallest]))
        prepared = self.peer.prepare(batches)
        with PeakMemory() as memory:
            start, start_cpu = time.perf_counter(), time.process_time()
            scores = self.peer.score(prepared)
            synchronize()
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
        Path(out).write_text(json.dumps([scores[n] for n in sorted(scores)]))
        found = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": memory.peak, "extra_mib": memory.extra}
        return {**found, "notes": getattr(self.peer, "notes", {})}


def main() -> None:
    """Answer until there is nothing more to read."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    torch.manual_seed(0)
    worker = Worker()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("do"))(**command)
        except Exception as error:
            first = str(error).strip().splitlines()[:1]
            answer = {"error": f"{type(error).__name__}: {first[0] if first else ''}", "trace": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
