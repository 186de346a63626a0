"""What a run tells whoever watches it; the command line draws it, a library call stays silent."""

from __future__ import annotations


class Reporter:
    """Receives a run's progress; this one ignores it."""

    def stage(self, title: str, total: int | None = None, unit: str = "rows", done: int = 0) -> None:
        """Say that a step begins.

        Args:
            title: what it does.
            total: how much of it there is, in `unit`, or None if that is not known.
            unit: what is counted.
            done: how much of it an earlier start did.
        """

    def advance(self, count: int, tokens: int = 0) -> None:
        """Say that some of the step is done.

        Args:
            count: how much, in the step's unit.
            tokens: tokens that were scored for it.
        """

    def note(self, text: str) -> None:
        """Say something worth a line.

        Args:
            text: one line.
        """
