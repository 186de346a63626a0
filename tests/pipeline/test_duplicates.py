"""Duplicates: found whatever their number, in bounded memory, and filled in the same way wherever it was stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradshield_fast.errors import InputError
from gradshield_fast.pipeline import duplicate_rows
from gradshield_fast.pipeline.duplicate_rows import Duplicates, Finder, turns_key


def turns(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def found(folder: Path, texts: list[str | None]) -> np.ndarray:
    finder = Finder(folder)
    for row, text in enumerate(texts):
        finder.add(row, None if text is None else turns("x", text))
    target = folder / "duplicates.npy"
    finder.write(target)
    assert {path.name for path in folder.iterdir()} == {"duplicates.npy"}
    return Duplicates.load(target).first(0, len(texts))


def expected(texts: list[str | None]) -> list[int]:
    first: dict[str, int] = {}
    return [row if text is None else first.setdefault(text, row) for row, text in enumerate(texts)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), st.sampled_from("abcdefgh")), max_size=60), st.sampled_from([3, 16, 1 << 20]))
def test_each_row_points_to_the_first_that_says_the_same(texts: list[str | None], held: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicate_rows, "_HELD", held)
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            assert found(Path(folder), texts).tolist() == expected(texts)


def test_a_part_of_the_rows_is_asked_for(tmp_path: Path) -> None:
    texts = list("abacabad")
    found(tmp_path, texts)  # type: ignore[arg-type]
    here = Duplicates.load(tmp_path / "duplicates.npy")
    assert here.first(3, 4).tolist() == [3, 0, 1, 0]
    assert here.first(8, 2).tolist() == [8, 9]


def test_keys_keep_turns_and_roles_apart() -> None:
    said = [
        turns("ab", "c"),
        turns("a", "bc"),
        turns("abc"),
        turns("ab", "c", ""),
        [{"role": "system", "content": "ab"}, {"role": "assistant", "content": "c"}],
        turns("user 1\nab", "c"),
    ]
    assert len({turns_key(messages) for messages in said}) == len(said)
    assert turns_key(turns("ab", "c")) == turns_key([dict(turn) for turn in turns("ab", "c")])


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "duplicates.npy"
    path.write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match="cannot be read"):
        Duplicates.load(path)
    np.save(path, np.zeros(3))
    with pytest.raises(InputError, match="pairs of rows"):
        Duplicates.load(path)
