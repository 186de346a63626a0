"""Errors that a person can act on: one line that says what was expected, what came, and what to do."""

from __future__ import annotations


class GradShieldError(Exception):
    """Base of every error that this package raises on purpose; the command line prints it as one line."""


class InputError(GradShieldError, ValueError):
    """A file, row, option, tensor or weight is not what was expected."""


class BackendUnavailable(GradShieldError, RuntimeError):
    """A backend that was asked for by name cannot run these inputs; the message says why."""


class ScoringError(GradShieldError, RuntimeError):
    """A weight or a row would have been scored wrongly; the message names it."""


class UnalignedModelError(GradShieldError):
    """The chosen safety score would mislead on this model; the message says what to use instead."""


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory ran out, on a GPU or on the CPU, whose allocator raises a RuntimeError.

    Args:
        error: what was raised.

    Returns:
        Whether a smaller batch may succeed.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
