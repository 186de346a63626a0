"""Units: the same rows from any starting point, whatever the file's kind, and an error where the rows are others."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import BAD_LINES, lines, row

from gradshield_fast.corpus import read_corpus
from gradshield_fast.corpus_files import find_files
from gradshield_fast.errors import InputError
from gradshield_fast.pipeline.options import CorpusOptions
from gradshield_fast.pipeline.units import Unit, UnitReader, cut_units, pack_units, shard_units, unpack_units

LIMIT = 4000
ROWS = 53


def text() -> bytes:
    """Rows of many lengths, blank lines, unusable rows, a row over the limit, and no newline at the end."""
    out = lines(row(number) for number in range(ROWS - len(BAD_LINES))).splitlines(keepends=True)
    out.insert(20, b" \t\n\n")
    return b"\xef\xbb\xbf" + b"".join(out) + b"\r\n".join(BAD_LINES.values())


def zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def table() -> pa.Table:
    return pa.Table.from_pylist([{"id": f"r{n}", "prompt": "x" * (n % 7), "response": "y" * n} for n in range(ROWS)])


def write_arrow(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table().schema) as writer:
        writer.write_table(table(), max_chunksize=10)


WRITERS: dict[str, Callable[[Path], object]] = {
    "c.jsonl": lambda path: path.write_bytes(text()),
    "c.jsonl.gz": lambda path: path.write_bytes(gzip.compress(text())),
    "c.jsonl.zst": lambda path: path.write_bytes(zst(text())),
    "c.parquet": lambda path: pq.write_table(table(), path, row_group_size=9),
    "c.arrow": write_arrow,
}


@pytest.fixture(params=[*WRITERS, "folder"])
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> CorpusOptions:
    folder = tmp_path / "corpus"
    folder.mkdir()
    names = ["c.jsonl", "c.jsonl.gz", "c.parquet"] if request.param == "folder" else [request.param]
    for name in names:
        WRITERS[name](folder / name)
    return CorpusOptions(folder if len(names) > 1 else folder / names[0], max_row_bytes=LIMIT)


def units_of(corpus: CorpusOptions, part_rows: int) -> list[Unit]:
    return cut_units(find_files(corpus.path), LIMIT, part_rows, lambda _: None)


@pytest.mark.parametrize("part_rows", [1, 8, 100])
def test_every_row_is_in_one_unit_in_whatever_order_they_are_read(corpus: CorpusOptions, part_rows: int) -> None:
    expected = list(read_corpus(corpus.path, max_row_bytes=LIMIT))
    units = units_of(corpus, part_rows)
    assert all(unit.rows <= part_rows for unit in units)
    assert unpack_units(pack_units(units), len(expected)) == units
    names = [file.name for file in find_files(corpus.path)]
    for order in (units, units[::-1], units[1::2] + units[::2], units[1:] + units[:1]):
        reader = UnitReader(corpus)
        found = {unit.number: list(reader.rows(unit)) for unit in order}
        assert [row for unit in units for row in found[unit.number]] == expected
        assert all(row.file == names[unit.file] for unit in units for row in found[unit.number])


def test_the_beginning_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WRITERS["c.jsonl"](tmp_path / "c.jsonl")
    WRITERS["c.parquet"](tmp_path / "c.parquet")
    last = {name: units_of(CorpusOptions(tmp_path / name), 8)[-1] for name in ("c.jsonl", "c.parquet")}
    # what lies before the unit is destroyed: it must not matter
    data = bytearray((tmp_path / "c.jsonl").read_bytes())
    data[: last["c.jsonl"].start] = b"\n" * last["c.jsonl"].start
    (tmp_path / "c.jsonl").write_bytes(data)
    groups: list[list[int]] = []
    real = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, batch_size, row_groups: (
            groups.append(row_groups) or real(self, batch_size=batch_size, row_groups=row_groups)
        ),
    )
    for name, unit in last.items():
        options = CorpusOptions(tmp_path / name, max_row_bytes=LIMIT if name == "c.jsonl" else 1 << 20)
        assert len(list(UnitReader(options).rows(unit))) == unit.rows
    assert groups == [[5]]


def test_long_rows_make_small_units(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(lines({"prompt": "x", "response": "y" * (20_000 if n % 10 == 0 else 10)} for n in range(100)))
    units = cut_units(find_files(path), 1 << 20, 16, lambda _: None)
    assert max(unit.bytes for unit in units) <= 16 * 2048
    assert sum(unit.rows for unit in units) == 100


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.replace(b"capitals", b"capitalS", 1),
        lambda data: data[: len(data) // 2],
    ],
    ids=["a letter", "cut short"],
)
def test_other_rows_than_were_counted_are_noticed(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(lines(row(number) for number in range(40)))
    units = cut_units(find_files(path), LIMIT, 8, lambda _: None)
    path.write_bytes(b"\n" + change(path.read_bytes()))
    reader = UnitReader(CorpusOptions(path))
    with pytest.raises(InputError, match="has changed since the run began"):
        [list(reader.rows(unit)) for unit in units]


def test_shards_share_the_bytes() -> None:
    units = [Unit(n, 0, n, 1, 0, 100 * (1 + n % 9), "") for n in range(200)]
    for count in (1, 2, 7, 300):
        shards = [shard_units(units, index, count) for index in range(1, count + 1)]
        assert sorted(unit.number for shard in shards for unit in shard) == list(range(200))
        loads = [sum(unit.bytes for unit in shard) for shard in shards]
        assert max(loads) - min(loads) <= 901


@pytest.mark.parametrize("damage", ["gap", "short", "fields"])
def test_units_that_do_not_cover_the_rows_are_refused(damage: str) -> None:
    packed = pack_units([Unit(n, 0, 5 * n, 5, 0, 100, "") for n in range(4)])
    if damage == "gap":
        del packed["values"][1]
    elif damage == "fields":
        packed["fields"] = packed["fields"][1:]
    with pytest.raises(ValueError, match=r"unit|rows"):
        unpack_units(packed, 21 if damage == "short" else 20)
