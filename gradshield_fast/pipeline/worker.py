"""A worker: a model, a direction and an open scorer, which turn units into parts.

All workers of a run agree on what the first one wrote down: the direction, the row that its rules are tried on, the
tokens of a batch, the number of CPU threads. So a part has the same bits, whoever makes it.
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gradshield_fast.chat import IGNORE, ChatEncoder, Encoded
from gradshield_fast.errors import InputError
from gradshield_fast.fingerprint import model_fingerprint
from gradshield_fast.loading import context_length, load_model, pick_device
from gradshield_fast.packing import pack
from gradshield_fast.pipeline.combining import check_combination
from gradshield_fast.pipeline.directing import describe, make_direction
from gradshield_fast.pipeline.encoding import Encoding, encode_unit, pick_workers
from gradshield_fast.pipeline.engine import Engine, beyond, given, vocabulary
from gradshield_fast.pipeline.folder import RunFolder
from gradshield_fast.pipeline.identity import differences
from gradshield_fast.pipeline.manifest import Manifest
from gradshield_fast.pipeline.options import RunOptions
from gradshield_fast.pipeline.parts import part_bytes
from gradshield_fast.pipeline.progress import Reporter
from gradshield_fast.pipeline.sessions import Timing
from gradshield_fast.pipeline.units import Unit, UnitReader

if TYPE_CHECKING:
    from gradshield_fast.scorer import Scorer


@dataclass(frozen=True)
class Task:
    """What an engine is given.

    Attributes:
        folder: the run's folder.
        manifest: its manifest.
        units: those to score.
        options: what was asked for.
        reporter: told about each batch.
        begin: called when the first unit can be scored.
        outcome: is given "scorer", how rows were scored.
    """

    folder: RunFolder
    manifest: Manifest
    units: list[Unit]
    options: RunOptions
    reporter: Reporter
    begin: Callable[[], None]
    outcome: dict[str, Any]


class Worker:
    """Scores units; use as a context manager, which loads the model and gives it back."""

    def __init__(
        self,
        folder: RunFolder,
        manifest: Manifest,
        options: RunOptions,
        reporter: Reporter,
        workers: int,
        units: Sequence[Unit] = (),
    ) -> None:
        """Take what it is to work on.

        Args:
            folder: the run's folder.
            manifest: its manifest.
            options: what was asked for.
            reporter: told about the steps and each batch.
            workers: processes that encode ahead, from `pick_workers`.
            units: what will be scored first; it is encoded while the model gets ready.
        """
        self._folder, self._manifest, self._options, self._reporter = folder, manifest, options, reporter
        self._workers, self._units = workers, units
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Worker:
        with contextlib.ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _open(self, stack: contextlib.ExitStack) -> None:
        import torch

        from gradshield_fast.direction import Direction
        from gradshield_fast.scorer import Scorer

        folder, options = self._folder, self._options
        self._reporter.stage("loading the model")
        model, tokenizer = load_model(**asdict(options.model))
        encoder = make_encoder(tokenizer, model.config, options)
        self._encoding = stack.enter_context(self._encoding_of(encoder))
        self._encoding.begin(self._units)
        prepared = folder.read(folder.prepared)
        if prepared is None or not folder.direction.exists():
            with folder.preparing():
                prepared = self._prepare(model, tokenizer, encoder)
        loaded = describe_model(model)
        other = differences(prepared["loaded"], loaded, "model.")
        other += differences(prepared["encoder"], encoder.describe(), "encoder.")
        if other:
            raise InputError(
                f"output folder {folder.path} holds a run of another model: {', '.join(other)}; name a new folder"
            )
        # read back even when just made: every worker scores against the same bits
        direction = Direction.load(folder.direction, model)
        if options.cut is not None:
            check_combination(options.cut, direction.count, options.scoring.normalize)
        if loaded["device"] == "cpu":
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(prepared["threads"])
        scoring = options.scoring
        scorer = stack.enter_context(
            Scorer(
                model,
                direction,
                scoring.backend,
                scoring.loss_reduction,
                norms=scoring.needs_norms,
                verify=scoring.verify,
                compile=scoring.compile,
                checkpoint=scoring.checkpoint,
            )
        )
        self.scorer: Scorer = scorer
        self._engine = Engine(scorer, scoring, self._reporter, self._settle(prepared))

    @property
    def _duplicates(self) -> Path | None:
        return self._folder.duplicates if self._options.scoring.dedupe else None

    def _encoding_of(self, encoder: ChatEncoder) -> Encoding:
        options = self._options
        return Encoding(options.corpus, options.model, encoder, self._workers, self._duplicates)

    def score(self, unit: Unit, upcoming: Sequence[Unit] = ()) -> tuple[bytes, Timing]:
        """Score one unit.

        Args:
            unit: which.
            upcoming: what will follow; its reading and encoding is begun, where processes are there to do it.

        Returns:
            The bytes of its part, and how long it took.
        """
        begun = time.perf_counter()
        waited, halved = self._encoding.waited, self._engine.halved
        part = self._engine.score(unit, self._encoding.take(unit, upcoming))
        content = part_bytes(part, unit)
        tokens = int(part.tokens[part.scored].sum())
        timing = Timing(
            unit.number,
            unit.rows,
            tokens,
            time.perf_counter() - begun,
            self._encoding.waited - waited,
            self._engine.halved - halved,
        )
        return content, timing

    @property
    def depth(self) -> int:
        """How many units are worthwhile to be named ahead."""
        return self._encoding.depth

    def describe(self) -> dict[str, Any]:
        """Describe how rows were scored: which rule and which backend ran belongs to the result.

        Returns:
            JSON values.
        """
        uses = (use.split(" @ ")[0] for uses in self.scorer.methods.values() for use in uses)
        methods = dict(sorted(Counter(uses).items()))
        return {"backends": self.scorer.backends, "ways": self.scorer.ways, "methods": methods}

    def _prepare(self, model: Any, tokenizer: Any, encoder: ChatEncoder) -> dict[str, Any]:
        """Make what all workers share, unless another one was faster."""
        import torch
        import transformers

        from gradshield_fast.direction import Direction

        folder, options = self._folder, self._options
        standing = folder.read(folder.prepared)
        if standing is not None and folder.direction.exists():
            return standing
        if not folder.direction.exists():
            direction = make_direction(model, tokenizer, options.direction, self._reporter)
            direction.save(folder.direction)
            self._reporter.note(f"direction: {direction!r}")
        trial, longest = self._trial(encoder, vocabulary(model))
        loaded = describe_model(model)
        weight = next(model.parameters())
        on_gpu = weight.device.type == "cuda"
        return folder.publish(
            folder.prepared,
            {
                "loaded": loaded,
                "environment": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "device": torch.cuda.get_device_name(weight.device) if on_gpu else platform.machine(),
                },
                "threads": options.engine.threads or torch.get_num_threads(),
                "encoder": encoder.describe(),
                "direction": describe(Direction.load(folder.direction, model)),
                "trial": trial,
                "longest": longest,
            },
        )

    def _trial(self, encoder: ChatEncoder, known: int | None) -> tuple[list[int], int]:
        """Find the first row that can be scored, and the longest of its unit."""
        reader = UnitReader(self._options.corpus, self._duplicates)
        for unit in self._manifest.units:
            rows = [row for row in encode_unit(unit, reader, encoder).rows() if row.usable and not beyond(row, known)]
            if rows:
                return rows[0].input_ids, max(len(row.input_ids) for row in rows)
        return [], 0

    def _settle(self, prepared: dict[str, Any]) -> int:
        """Let the scorer find its rules on the row that all workers use; say how many tokens a batch has."""
        ids, wanted = prepared["trial"], self._options.scoring.batch_tokens
        if ids:
            trial = Encoded(ids, [IGNORE, *ids[1:]], len(ids) - 1, "ok")
            self.scorer.settle(given(next(pack([(0, trial)], batch_tokens=1))))
        if wanted != "auto":
            return wanted
        chosen = self._folder.read(self._folder.batches)
        if chosen is None:
            from gradshield_fast.memory import BATCH_TOKENS, Choice, choose_batch_tokens

            choice = choose_batch_tokens(self.scorer, prepared["longest"]) if ids else Choice(BATCH_TOKENS, "no row")
            chosen = self._folder.publish(self._folder.batches, asdict(choice))
            self._reporter.note(f"batches of {chosen['tokens']} tokens: {chosen['why']}")
        return chosen["tokens"]


def scored_here(task: Task) -> Iterator[tuple[bytes, Timing]]:
    """Score units in this process.

    Args:
        task: which, and with what.

    Yields:
        The bytes of each unit's part, and how long it took.
    """
    on_gpu = pick_device(task.options.model.device).type != "cpu"
    workers = pick_workers(task.options.engine.workers, len(task.units), on_gpu)
    with Worker(task.folder, task.manifest, task.options, task.reporter, workers, task.units) as worker:
        task.begin()
        for at, unit in enumerate(task.units):
            yield worker.score(unit, task.units[at + 1 : at + 1 + worker.depth])
        task.outcome["scorer"] = worker.describe()


def make_encoder(tokenizer: Any, config: Any, options: RunOptions) -> ChatEncoder:
    """Make the encoder of a run.

    Args:
        tokenizer: the model's tokenizer.
        config: the model's config, for its context length.
        options: the run.

    Returns:
        The encoder.

    Raises:
        InputError: rows are to be cut beyond what the model can read.
    """
    limit, wanted = context_length(config), options.scoring.max_length
    if limit is not None and wanted is not None and wanted > limit:
        raise InputError(f"--max-length {wanted} is beyond the model's context of {limit} tokens")
    return ChatEncoder(tokenizer, max_length=wanted or limit, template=options.scoring.template)


def describe_model(model: Any) -> dict[str, str]:
    """Describe a model that was loaded; all workers of a run must have the same.

    Args:
        model: the model.

    Returns:
        Its weights' fingerprint, their type and the kind of device.
    """
    weight = next(model.parameters())
    dtype = str(weight.dtype).removeprefix("torch.")
    return {"weights": model_fingerprint(model), "dtype": dtype, "device": weight.device.type}
