"""What a scoring step takes of memory, as a formula in the batch's shape, and the batch that fits the free memory.

    bytes = max(per_token tokens + per_response response_tokens + fixed,   at the head, or in the widest backward
                attention_per_token tokens + per_square squares)           in an attention's backward

    per_token       what the graph and the hooks keep of a token through all layers until the backward pass has used it,
                    and the widest layer's gradients and projections while its backward pass runs. With checkpoints: one
                    layer's share, and of the others their input alone.
    per_response    the fused head's hidden states, their gradient, and its block of logits; without a fused head, the
                    logits in float32, their softmax and their gradient.
    fixed           what is as large for every batch, such as a dense direction's block in another dtype.
    attention_per_token     as per_token, at that moment.
    per_square      attention scores. A model's own eager attention keeps them for every row, so squares is the sum of
                    squared row lengths; ours makes them row by row, or, in a kernel, never: squares is the longest
                    row's square. With norms also the Gram matrices of a row's tokens.

The coefficients are not derived from the model's class but taken from the allocator's record of five small steps of the
very scorer, so that they hold for any layers, directions and ways.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import profiler

from gradshield_fast.errors import InputError, ScoringError, is_out_of_memory
from gradshield_fast.loading import context_length
from gradshield_fast.packing import BATCH_TOKENS

if TYPE_CHECKING:
    from gradshield_fast.scorer import Scorer

LEAST = 256
"""Tokens of the smallest batch that is chosen; what does not fit even so is scored in halves."""

CPU_MOST = 4096
"""Tokens beyond which a batch was not faster on a CPU: SmolLM2-135M in bfloat16 on two cores scored 11 to 14 % more
tokens a second in batches of 4096 than of 2048, and fewer in batches of 8192 than in either."""

SHARE = 0.5
"""Share of the free memory that a batch may take: kernels in C++ keep buffers that no allocator records, freed blocks
do not fit the next tensor exactly, and other programs want memory too."""

SHORT, ROWS = 64, 6
"""Tokens of a trial row, and rows of a trial batch."""

LONG = (192, 448)
"""Tokens of the rows that show what grows with a row's square; two of them at a time, since a loop over rows may hold
on to what it made for one while it makes the same for the next."""


@dataclass(frozen=True)
class StepMemory:
    """Peak memory of one call of `Scorer.score` above the loaded model and its directions; the terms are above.

    Attributes:
        per_token: bytes for a token of the batch; padding counts where the model is given it.
        per_response: bytes for a token that the loss is on.
        fixed: bytes.
        attention_per_token: bytes for a token, where attention decides.
        per_square: bytes for a squared token of a row, there.
        every_row: whether the squares of all rows count, or the longest row's alone.
    """

    per_token: float
    per_response: float
    fixed: float
    attention_per_token: float
    per_square: float
    every_row: bool

    def bytes(self, tokens: int, response_tokens: int, rows: int, longest: int) -> int:
        """Give a batch's peak.

        Args:
            tokens: tokens that the model is given.
            response_tokens: those of them that the loss is on.
            rows: rows of the batch.
            longest: tokens of its longest row.

        Returns:
            Bytes.
        """
        squares = longest**2 * (rows if self.every_row else 1)
        linear = self.per_token * tokens + self.per_response * response_tokens + self.fixed
        return int(max(linear, self.attention_per_token * tokens + self.per_square * squares))

    def largest(self, free: int, longest: int, most: int | None) -> int:
        """Choose the largest batch that fits.

        A power of two, so that a little more or less free memory makes no other batches: their rounding would differ.

        Args:
            free: bytes that a batch may take.
            longest: tokens of the longest row.
            most: bound on the batch, or None.

        Returns:
            Tokens, at least `LEAST` and at most `most`; a batch whose tokens all carry a loss fits.
        """
        budget = LEAST
        while most is None or 2 * budget <= most:
            longer = 2 * budget
            row = max(1, min(longest, longer))
            if self.bytes(longer, longer, -(-longer // row), row) > free:
                break
            budget = longer
        return budget


def step_memory(scorer: Scorer) -> StepMemory:
    """Work the coefficients out by five small steps.

    Args:
        scorer: open and settled; nothing that it promises of its first batch is used up.

    Returns:
        The formula.

    Raises:
        ScoringError: nothing keeps a record of this device's memory.
    """
    limit = context_length(scorer.model.config) or max(LONG)
    short = min(SHORT, limit)
    few = peak_of(scorer, ROWS, short, short // 8)
    full = peak_of(scorer, ROWS, short, short - 1)
    half = peak_of(scorer, ROWS // 2, short, short - 1)
    per_response = max(0.0, (full - few) / (ROWS * (short - 1 - short // 8)))
    fixed = max(0.0, 2.0 * half - full)
    per_token = (full - fixed) / (ROWS * short) - per_response * (short - 1) / short
    every_row = not scorer.ways.get("attention", "").startswith("by rows")
    found = StepMemory(per_token, per_response, fixed, 0.0, 0.0, every_row)
    if limit < max(LONG):
        return found
    # two rows of n tokens: 2 n attention_per_token + n^2 per_square, or twice the square where all rows count
    one, two = (peak_of(scorer, 2, tokens, tokens - 1) / (2 * tokens) for tokens in LONG)
    slope = max(0.0, (two - one) / (LONG[1] - LONG[0]))
    return replace(found, attention_per_token=two - slope * LONG[1], per_square=slope if every_row else 2 * slope)


def peak_of(scorer: Scorer, rows: int, tokens: int, response_tokens: int) -> int:
    """Measure a step on rows of one token over and over.

    Args:
        scorer: open and settled.
        rows: rows of the batch.
        tokens: tokens of each.
        response_tokens: those of them, the last ones, that the loss is on.

    Returns:
        Bytes at the peak.
    """
    ids = (torch.arange(rows * tokens) % 7 + 1).view(rows, tokens)
    labels = ids.clone()
    labels[:, : tokens - response_tokens] = -100
    verify, scorer.verify = scorer.verify, False
    try:
        return peak_bytes(lambda: scorer.score({"input_ids": ids, "labels": labels}), scorer.device)
    finally:
        scorer.verify = verify


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Measure how much memory torch's allocator hands out during a call, at the most, above what it had before.

    Args:
        run: the call.
        device: where its tensors are.

    Returns:
        Bytes.

    Raises:
        ScoringError: nothing keeps a record of this device's memory, or a profiler is at work.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or torch.autograd._profiler_enabled():
        raise ScoringError(f"nothing records how much memory is in use on {device.type}")
    record: Any = profiler.profile(profile_memory=True)
    with _without_stderr():
        record.__enter__()
    try:
        run()
    finally:
        with _without_stderr():
            record.__exit__(None, None, None)
    events = [(e.start_ns(), e.nbytes()) for e in record.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        held += size
        most = max(most, held)
    return most


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Silence the profiler, which says on stderr, below Python, that it starts and stops."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def free_bytes(device: torch.device) -> int | None:
    """Say how much memory is free.

    Args:
        device: where tensors are made.

    Returns:
        Bytes; None where that is not known. On a GPU the blocks that torch holds without need count as free.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    known = [size for size in (_machine_free(), *_cgroups_free()) if size is not None]
    return min(known) if known else None


def _machine_free(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroups_free(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What each control group above this process leaves it; page cache counts as free, as it does for the machine."""
    try:
        entries = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return []
    free = []
    for _, controllers, path in (entry for entry in entries if len(entry) == 3):
        if controllers == "":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inside = base / path.lstrip("/")
        # inside a container the path may be the host's, and the group is mounted as the root
        groups = [inside, *inside.parents] if inside.is_dir() else [base]
        free += [left for group in groups if (left := _group_free(group, names)) is not None]
    return free


def _group_free(group: Path, names: Sequence[str]) -> int | None:
    limit_name, used_name, cache_name = names
    try:
        limit = (group / limit_name).read_text().strip()
        if limit == "max":
            return None
        used = int((group / used_name).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - used + int(stat.get(cache_name, 0)))
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Choice:
    """A batch size that was chosen, for a run's record.

    Attributes:
        tokens: tokens of a batch.
        why: what decided it.
        free: bytes that were free, or None.
        memory: the formula, or None where there is none.
    """

    tokens: int
    why: str
    free: int | None = None
    memory: StepMemory | None = None


def choose_batch_tokens(scorer: Scorer, longest: int) -> Choice:
    """Choose the largest batch that fits a share of the free memory.

    On a CPU no larger than what was measured to be worth it, `CPU_MOST`; on a GPU memory alone decides. Batches change
    a score by rounding at the most.

    Args:
        scorer: open and settled.
        longest: tokens of the longest row that is to be expected.

    Returns:
        The choice; `BATCH_TOKENS` where memory cannot be told.
    """
    devices = {weight.device for weight in scorer.model.parameters()}
    free = free_bytes(scorer.device) if len(devices) == 1 else None
    if free is None:
        return Choice(BATCH_TOKENS, "free memory is not known")
    try:
        memory = step_memory(scorer)
    except (ScoringError, InputError, MemoryError, RuntimeError) as error:
        if isinstance(error, (ScoringError, InputError)) or is_out_of_memory(error):
            return Choice(LEAST if is_out_of_memory(error) else BATCH_TOKENS, f"no trial step: {error}", free)
        raise
    most = CPU_MOST if scorer.device.type == "cpu" else None
    tokens = memory.largest(int(SHARE * free), longest, most)
    return Choice(tokens, "larger is not faster" if tokens == most else "memory", free, memory)
