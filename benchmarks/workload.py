"""What the benchmarks of whole models share: real rows, their batches, a model, a direction, and the memory taken."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from gradshield_fast import Direction, Scorer
from gradshield_fast.chat import ChatEncoder, Encoded
from gradshield_fast.errors import InputError
from gradshield_fast.heap import keep_freed_memory
from gradshield_fast.loading import load_model, load_tokenizer
from gradshield_fast.lowrank import LowRank
from gradshield_fast.packing import Batch, pack

FILES = ("gsm8k_train_2k", "instruct_apache_1k", "banking77_1k", "mts_dialog_1k")
"""Maths, instructions, one-line classification and long dialogues: rows of very different lengths."""

IGNORE = -100

RANDOM: dict[str, dict[str, Any]] = {
    "llama-3-8b-random": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "smollm2-random": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}
"""Models of a known shape with random weights: name -> configuration. They need no download, and speed is the same."""

TOKENIZER = "smollm2-demo"
"""Whose tokens they read, unless asked otherwise."""


def add_options(parser: argparse.ArgumentParser, *, rows: int, batch_tokens: int | None = None) -> None:
    """Add the options that choose rows, model and direction.

    Args:
        parser: the benchmark's own.
        rows: how many rows unless asked otherwise.
        batch_tokens: tokens of a batch unless asked otherwise; None: the benchmark has no such option.
    """
    parser.add_argument("--data", type=Path, default=os.environ.get("GRADSHIELD_SHARED_DATA"), help="folder of rows")
    parser.add_argument("--model", default="smollm2-demo", help=f"also one of {', '.join(RANDOM)}")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--rows", type=int, default=rows)
    parser.add_argument("--max-length", type=int, default=256, help="tokens a row is cut at")
    parser.add_argument("--probes", type=int, default=16, help="probes of the direction; no timing depends on it")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch; its own choice by default")
    if batch_tokens is not None:
        parser.add_argument(
            "--batch-tokens", type=int, default=batch_tokens, help="tokens of a batch, padding included"
        )


def data_folder(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Path:
    """Take the data folder from the options, or end the program with advice.

    Args:
        parser: the benchmark's own.
        options: what it parsed.

    Returns:
        The folder.
    """
    if options.data is None:
        parser.error("give the data folder with --data or GRADSHIELD_SHARED_DATA")
    return Path(options.data)


def read_rows(data: Path, tokenizer: Any, count: int, max_length: int) -> list[Encoded]:
    """Encode real rows, as many from each file: the first ones that can be scored.

    Args:
        data: folder with the files.
        tokenizer: the model's.
        count: how many in all; fewer come back where the files have no more.
        max_length: tokens a row is cut at.

    Returns:
        Rows that can be scored.

    Raises:
        InputError: a file is missing.
    """
    encoder = ChatEncoder(tokenizer, max_length=max_length)
    taken: list[Encoded] = []
    for k, name in enumerate(FILES):
        path = data / f"{name}.jsonl"
        if not path.is_file():
            raise InputError(f"{path}: no such file; give the data folder with --data or GRADSHIELD_SHARED_DATA")
        lines = path.read_text(encoding="utf-8").splitlines()
        encoded = (encoder.encode(json.loads(line)["messages"]) for line in lines)
        share = (k + 1) * count // len(FILES) - k * count // len(FILES)
        taken += islice((row for row in encoded if row.usable), share)
    return taken


def batches_of(rows: Iterable[Encoded], batch_tokens: int) -> list[Batch]:
    """Pack rows the way the package does, longest first.

    Args:
        rows: what to pack; a row's position is its place here.
        batch_tokens: tokens of a batch, padding included.

    Returns:
        The batches.
    """
    return list(pack(enumerate(rows), batch_tokens=batch_tokens))


def as_taken(scorer: Scorer, batches: Sequence[Batch]) -> list[Batch]:
    """Pack rows anew for a scorer whose model takes them without padding, as the package's own pipeline does.

    Args:
        scorer: open.
        batches: packed rows, whose largest array is the budget.

    Returns:
        Batches whose own tokens fill the budget; the same ones for a model that takes padding.
    """
    scorer.settle(padded(min(batches, key=lambda batch: batch.input_ids.size)))
    if scorer.ways["packing"] != "packed":
        return list(batches)
    rows = []
    for batch in batches:
        lengths = batch.attention_mask.sum(1).tolist()
        for position, length, ids, labels in zip(
            batch.positions.tolist(), lengths, batch.input_ids.tolist(), batch.labels.tolist(), strict=True
        ):
            labels = labels[:length]
            response = sum(label != IGNORE for label in labels)
            rows.append((position, Encoded(ids[:length], labels, response, "ok", "")))
    return list(pack(rows, batch_tokens=max(batch.input_ids.size for batch in batches), padded=False))


def tokens_of(rows: Sequence[Encoded]) -> tuple[int, int]:
    """Count tokens.

    Args:
        rows: the rows.

    Returns:
        All tokens, and those with a loss.
    """
    return sum(len(row.input_ids) for row in rows), sum(row.response_tokens for row in rows)


def open_model(name: str, dtype: str, threads: int | None = None, tokenizer: str = TOKENIZER) -> tuple[Any, Any]:
    """Load a model in evaluation mode, on the first GPU if there is one.

    Args:
        name: as `gradshield_fast.loading.load_model` takes it, or one of `RANDOM`.
        dtype: type of its weights.
        threads: threads of torch; None leaves them.
        tokenizer: whose tokens a random model reads.

    Returns:
        The model and its tokenizer.
    """
    keep_freed_memory()  # as the program does
    if threads is not None:
        torch.set_num_threads(threads)
    if name in RANDOM:
        return _random_llama(name, dtype), load_tokenizer(tokenizer)
    model, own = load_model(name, dtype=dtype)
    return model.eval(), own


def _random_llama(name: str, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**RANDOM[name]), dtype=getattr(torch, dtype)).eval()


def random_direction(model: torch.nn.Module, rank: int, seed: int = 0) -> Direction:
    """Draw a direction of low rank from the start, for a model whose dense gradient has no meaning or no room.

    Args:
        model: the model.
        rank: columns of the factors.
        seed: of the draw.

    Returns:
        Random factors for every matrix, and a random vector for every other weight.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return Direction(
        {
            name: LowRank(draw(w.shape[0], rank), draw(w.shape[1], rank)) if w.ndim == 2 else draw(*w.shape)
            for name, w in model.named_parameters()
        }
    )


def probe_direction(model: Any, tokenizer: Any, probes: int) -> Direction:
    """Build the direction that all rows are scored against, r = grad refusal_margin, dense.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        probes: how many of the bundled probes.

    Returns:
        The direction, over every weight.
    """
    from gradshield_fast import SafetyProbes  # here, since a peer's process has no use for it

    return Direction.from_probes(model, tokenizer, SafetyProbes.default().subset(probes), score="refusal_margin")


def linear_weights(model: torch.nn.Module) -> list[str]:
    """Name the weights of the linear layers inside the blocks: those that every peer can score.

    Args:
        model: a causal language model.

    Returns:
        Names as in `named_parameters`, without the head, whose weight is often the embedding's.
    """
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]


def restricted(direction: Direction, names: Iterable[str]) -> Direction:
    """Keep a dense direction's entries on some weights.

    Args:
        direction: a single direction.
        names: weights to keep.

    Returns:
        The smaller direction, of the same origin.
    """
    return Direction({name: direction.parts[0][name] for name in names}, meta=direction.meta)


def padded(batch: Batch) -> dict[str, Any]:
    """Give a batch the way `Scorer.score` takes it.

    Args:
        batch: packed rows.

    Returns:
        Its arrays by name.
    """
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}


def row_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Reduce logits to the mean loss of each row, in float32, with no branch on the data.

    Args:
        logits: Float[Tensor, "rows tokens vocabulary"].
        labels: Int64[Tensor, "rows tokens"], not shifted, -100 where there is no loss.

    Returns:
        Float32[Tensor, "rows"], nats.
    """
    targets = labels[:, 1:]
    counted = (targets != IGNORE).float()
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return (nll.view_as(counted) * counted).sum(1) / counted.sum(1)


class PeakMemory:
    """Measures how far this process's resident memory (or the GPU's allocations) rises within a `with` block.

    Linux alone lets a process reset its high-water mark; elsewhere the figure is None.

    Attributes:
        before: MiB when the block began.
        peak: MiB at its highest inside the block, or None.
    """

    def __enter__(self) -> PeakMemory:
        """Reset the mark.

        Returns:
            This measurement.
        """
        self.peak: float | None = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
            return self
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._reset = True
        except OSError:
            self._reset = False
        self.before = _status("VmRSS") or 0.0
        return self

    def __exit__(self, *_: object) -> None:
        """Read the mark."""
        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated() / 2**20
        elif self._reset:
            self.peak = _status("VmHWM")

    @property
    def extra(self) -> float | None:
        """MiB that the block took on top of what was there before."""
        return None if self.peak is None else max(0.0, self.peak - self.before)


def _status(key: str) -> float | None:
    path = Path("/proc/self/status")
    found = re.search(rf"^{key}:\s+(\d+) kB", path.read_text(), re.MULTILINE) if path.is_file() else None
    return int(found.group(1)) / 1024 if found else None


def synchronize() -> None:
    """Wait for the GPU, where there is one, so that a clock read next is true."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
