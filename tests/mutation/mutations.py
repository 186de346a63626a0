"""The list: what is broken, where, and which tests should notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One break.

    Attributes:
        name: short, unique.
        what: what is broken, for the table.
        file: path in the repository.
        old: text that stands in it once.
        new: text in its place.
        tests: files or node ids that should notice.
        builds: whether the CPU extension must be built again.
    """

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    builds: bool = False


MUTATIONS: tuple[Mutation, ...] = ()
