"""Peers that do what real ones do to a benchmark: score right, raise, print to stdout, die."""

from __future__ import annotations

import os

from benchmarks.peers.ours import Dense
from benchmarks.peers.peer import Scores
from gradshield_fast.packing import Batch


class Sound(Dense):
    """Ours, and talkative: what it prints must not reach the protocol."""

    batch_tokens = (64, 128)

    def score(self, prepared: list[Batch]) -> Scores:
        print("a peer may print to stdout", flush=True)
        os.write(1, b'{"error": "even like this"}\n')
        return super().score(prepared)


class Raises(Dense):
    batch_tokens = (64,)

    def score(self, prepared: list[Batch]) -> Scores:
        raise ValueError("no such layer\nand a second line")


class NeedsSmallBatches(Dense):
    batch_tokens = (64, 100_000)

    def score(self, prepared: list[Batch]) -> Scores:
        if max(batch.input_ids.size for batch in prepared) > 64:
            raise MemoryError("too large")
        return super().score(prepared)


class Dies(Dense):
    batch_tokens = (64,)

    def score(self, prepared: list[Batch]) -> Scores:
        os.write(2, b"out of memory, says somebody\n")
        os.kill(os.getpid(), 9)
        return {}
