"""The terminal side of the command line: progress, one-line errors, and text that cannot harm a terminal."""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import json
import signal
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, ParamSpec

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from gradshield_fast.errors import GradShieldError
from gradshield_fast.pipeline.progress import Reporter

P = ParamSpec("P")
DONE, SOME_UNSCORED, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
PLAIN_SECONDS = 10.0
"""A run whose output is not a terminal prints a line as often."""


class Terminated(BaseException):
    """SIGTERM came; raised where the program stands, so that files are put in order as on Ctrl-C."""


class Settings:
    """What the user asked of the terminal for the whole program.

    Attributes:
        debug: show tracebacks.
    """

    debug = False


def guarded(*, resumable: bool = False) -> Callable[[Callable[P, int]], Callable[P, None]]:
    """Make a command end in an exit code and at most one line of error, whatever happens in it.

    Args:
        resumable: the command goes on where it stopped when it is run again.

    Returns:
        A decorator for a command that returns its exit code.
    """

    def decorate(command: Callable[P, int]) -> Callable[P, None]:
        @functools.wraps(command)
        def inner(*args: P.args, **kwargs: P.kwargs) -> None:
            raise typer.Exit(_exit_code(lambda: command(*args, **kwargs), resumable))

        return inner

    return decorate


def _exit_code(command: Callable[[], int], resumable: bool) -> int:
    again = "; run the same command again to go on" if resumable else ""
    try:
        return command()
    except KeyboardInterrupt:
        say(f"interrupted{again}")
        return INTERRUPTED
    except Terminated:
        say(f"terminated{again}")
        return TERMINATED
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except Exception as error:
        if Settings.debug:
            raise
        say(f"error: {_one_line(error)}")
        return BAD_INPUT


def _one_line(error: Exception) -> str:
    text = plain(str(error).strip().split("\n")[0])
    if isinstance(error, GradShieldError):
        return text
    if "No space left on device" in text or getattr(error, "errno", None) == errno.ENOSPC:
        return f"no space left on the disk: free some and run the same command again ({text})"
    return f"{type(error).__name__}: {text or 'no message'} (unexpected; run again with --debug to see where)"


def say(text: str) -> None:
    """Print a line to the standard error stream.

    Args:
        text: the line.
    """
    print(text, file=sys.stderr, flush=True)


def plain(text: str) -> str:
    """Make text from a corpus or a model harmless to a terminal.

    Args:
        text: anything.

    Returns:
        The text with a middle dot for every control, format (right-to-left overrides among them) and private character,
        and for unpaired surrogates.
    """
    return "".join("·" if unicodedata.category(c).startswith("C") else c for c in text)


def catch_sigterm() -> None:
    """Let SIGTERM end the program the way Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    with contextlib.suppress(ValueError):  # not in the main thread: the caller's own handling stands
        signal.signal(signal.SIGTERM, stop)


@contextlib.contextmanager
def watching(as_json: bool = False) -> Iterator[Reporter]:
    """Draw a run's progress for the scope: live on a terminal, as sparse lines elsewhere.

    Args:
        as_json: draw nothing; write a JSON line for each step, for each note, and now and then between them.

    Yields:
        What to report to.
    """
    console = Console(stderr=True)
    if as_json:
        yield _Json()
    elif console.is_terminal:
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
            TimeElapsedColumn(),
            console=console,
        ) as progress:
            yield _Live(progress)
    else:
        yield _Lines()


class _Pace:
    """Measures a stage from where it began."""

    def __init__(self, total: int | None = None, unit: str = "rows", done: int = 0) -> None:
        self.total, self.unit, self.done = total, unit, done
        self.timed = self.tokens = 0
        self.begun = time.perf_counter()

    def add(self, count: int, tokens: int) -> None:
        self.done += count
        self.timed += count
        self.tokens += tokens

    def rates(self) -> dict[str, float]:
        """Say how fast it is, and how long the rest takes; nothing before there is something to time."""
        seconds = time.perf_counter() - self.begun
        if not self.timed or seconds < 0.5:
            return {}
        rates = {"rate": self.timed / seconds, "tokens_rate": self.tokens / seconds}
        if self.total is not None and self.done < self.total:
            rates["seconds_left"] = (self.total - self.done) * seconds / self.timed
        return rates

    def __str__(self) -> str:
        rates = self.rates()
        parts = [f"{rates['rate']:.3g} {self.unit}/s"] if rates else []
        if rates.get("tokens_rate"):
            parts.append(f"{rates['tokens_rate']:,.0f} tokens/s")
        if "seconds_left" in rates:
            parts.append(f"{clock(rates['seconds_left'])} left")
        return ", ".join(parts)


class _Live(Reporter):
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None
        self._pace = _Pace()

    def stage(self, title: str, total: int | None = None, unit: str = "rows", done: int = 0) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._pace = _Pace(total, unit, done)
        self._task = self._progress.add_task(title, total=total, completed=done, pace="")

    def advance(self, count: int, tokens: int = 0) -> None:
        self._pace.add(count, tokens)
        if self._task is not None:
            self._progress.update(self._task, advance=count, pace=str(self._pace))

    def note(self, text: str) -> None:
        self._progress.console.print(Text(plain(text)))


class _Lines(Reporter):
    def __init__(self) -> None:
        self._title = ""
        self._pace = _Pace()
        self._next = 0.0

    def stage(self, title: str, total: int | None = None, unit: str = "rows", done: int = 0) -> None:
        self._title, self._pace = title, _Pace(total, unit, done)
        self._next = time.perf_counter() + PLAIN_SECONDS
        before = f", {done:,} of them done before" if done else ""
        say(f"{title}: {total:,} {unit}{before}" if total is not None else title)

    def advance(self, count: int, tokens: int = 0) -> None:
        self._pace.add(count, tokens)
        if time.perf_counter() >= self._next:
            self._next = time.perf_counter() + PLAIN_SECONDS
            of = f" of {self._pace.total:,}" if self._pace.total is not None else ""
            say(f"{self._title}: {self._pace.done:,}{of} {self._pace.unit}, {self._pace}")

    def note(self, text: str) -> None:
        say(plain(text))


class _Json(Reporter):
    def __init__(self) -> None:
        self._title = ""
        self._pace = _Pace()
        self._next = 0.0

    def _write(self, event: str, **values: Any) -> None:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        say(json.dumps({"time": now, "event": event, **values}))

    def _progress(self, event: str) -> None:
        pace = self._pace
        rates = {name: float(f"{rate:.6g}") for name, rate in pace.rates().items()}
        self._write(event, stage=self._title, done=pace.done, total=pace.total, unit=pace.unit, **rates)

    def stage(self, title: str, total: int | None = None, unit: str = "rows", done: int = 0) -> None:
        self._title, self._pace = title, _Pace(total, unit, done)
        self._next = time.perf_counter() + PLAIN_SECONDS
        self._progress("stage")

    def advance(self, count: int, tokens: int = 0) -> None:
        self._pace.add(count, tokens)
        if time.perf_counter() >= self._next:
            self._next = time.perf_counter() + PLAIN_SECONDS
            self._progress("progress")

    def note(self, text: str) -> None:
        self._write("note", text=text)


def clock(seconds: float) -> str:
    """Write a duration.

    Args:
        seconds: how long.

    Returns:
        Such as "8.2 s", "3:05 min" or "2:03:05 h".
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"


def cell(value: Any) -> Text:
    """Put a value into a table: no markup is read in it.

    Args:
        value: anything.

    Returns:
        Its text, harmless to a terminal.
    """
    return Text(plain(str(value)))
