"""Worker processes and shards: the same bytes as in one process, and an error where a part or a lock is not right."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import corpus

from gradshield_fast.chat import ChatEncoder
from gradshield_fast.corpus_files import find_files
from gradshield_fast.errors import InputError, ScoringError
from gradshield_fast.loading import load_tokenizer
from gradshield_fast.pipeline.encoding import Encoding, pick_workers
from gradshield_fast.pipeline.folder import RunFolder
from gradshield_fast.pipeline.manifest import read_manifest
from gradshield_fast.pipeline.options import CutOptions, EngineOptions, RunOptions
from gradshield_fast.pipeline.progress import Reporter
from gradshield_fast.pipeline.run import recut, run
from gradshield_fast.pipeline.units import cut_units
from tests.pipeline.folder_files import StopAt, files, read_parts


class Notes(Reporter):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize("workers", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_worker_processes_change_no_byte(asked: RunOptions, tmp_path: Path, workers: int) -> None:
    run(asked)
    ahead = replace(asked, out=tmp_path / "ahead", engine=EngineOptions(workers=workers))
    with pytest.raises(KeyboardInterrupt):
        run(ahead, StopAt(20))
    run(ahead)
    assert files(ahead.out) == files(asked.out)


def test_a_worker_process_that_dies_is_one_line(asked: RunOptions) -> None:
    encoder = ChatEncoder(load_tokenizer(asked.model.name))
    units = cut_units(find_files(asked.corpus.path), 10**6, 8, lambda _: None)
    with Encoding(asked.corpus, asked.model, encoder, workers=1) as encoding:
        encoding.take(units[0], units[1:])
        assert encoding._pool is not None
        for pid in list(encoding._pool._processes):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(ScoringError, match="ahead died"):
            [encoding.take(unit) for unit in units[1:]]


def test_ctrl_c_is_not_lost_while_a_unit_is_handed_to_a_process(
    asked: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = cut_units(find_files(asked.corpus.path), 10**6, 8, lambda _: None)
    encoder = ChatEncoder(load_tokenizer(asked.model.name))
    with Encoding(asked.corpus, asked.model, encoder, workers=1) as encoding:
        assert encoding._pool is not None
        monkeypatch.setattr(encoding._pool, "submit", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        # a shell starts what it runs in the background with Ctrl-C ignored
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                encoding.begin(units)
        finally:
            signal.signal(signal.SIGINT, before)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_corpus_that_changes_under_the_run_is_noticed_in_a_worker_process(asked: RunOptions) -> None:
    class Change(Reporter):
        def stage(self, title: str, total: int | None = None, unit: str = "rows", done: int = 0) -> None:
            if title == "loading the model":
                path = Path(asked.corpus.path)
                path.write_bytes(path.read_bytes().replace(b"Question 41", b"Question 14"))

    for workers in (0, 1):
        corpus(asked.corpus.path, 50)
        with pytest.raises(InputError, match="has changed since the run began: rows 40 to 47"):
            run(replace(asked, engine=EngineOptions(workers=workers)), Change())
    assert not (asked.out / "kept.jsonl").exists()


def test_few_units_need_no_processes() -> None:
    assert pick_workers(3, 1, on_gpu=True) == 0
    assert pick_workers(3, 2, on_gpu=True) == 3
    assert pick_workers(None, 5, on_gpu=True) == 0
    assert pick_workers(None, 100, on_gpu=True) >= 1


def shard(asked: RunOptions, index: int, count: int, out: Path) -> RunOptions:
    return replace(asked, out=out, cut=None, engine=EngineOptions(shard=(index, count)))


def test_shards_in_any_order_and_a_merge_leave_the_same_bytes(asked: RunOptions, tmp_path: Path) -> None:
    run(asked)
    for seed in (0, 1):
        out = tmp_path / f"sharded-{seed}"
        order = random.Random(seed).sample(range(1, 4), 3)
        for index in order[:2]:
            assert run(shard(asked, index, 3, out))
            assert not run(shard(asked, index, 3, out))
        with pytest.raises(InputError, match="parts are missing or damaged"):
            recut(out, CutOptions())
        with pytest.raises(KeyboardInterrupt):
            run(shard(asked, order[2], 3, out), StopAt(9))
        run(shard(asked, order[2], 3, out))
        recut(out, CutOptions())
        assert files(out) == files(asked.out)
        record = json.loads((out / "run.json").read_text())
        assert [s["shard"] for s in record["sessions"]] == [f"{i}/3" for i in [*order, order[2]]]
        assert sorted(n for s in record["sessions"] for n in s["units"]) == list(range(7))


def test_a_part_of_no_unit_stops_the_merge(asked: RunOptions) -> None:
    run(asked)
    scores = asked.out / "scores"
    (scores / "part-00007.parquet").write_bytes((scores / "part-00006.parquet").read_bytes())
    with pytest.raises(InputError, match="part-00007"):
        recut(asked.out, CutOptions())


def test_a_shard_of_another_run_is_refused(asked: RunOptions, tmp_path: Path) -> None:
    run(shard(asked, 1, 2, asked.out))
    other = replace(shard(asked, 2, 2, asked.out), corpus=replace(asked.corpus, path=tmp_path / "other.jsonl"))
    corpus(other.corpus.path, 49)
    with pytest.raises(InputError, match="another run: it differs in corpus"):
        run(other)
    with pytest.raises(InputError, match=r"scoring.max_length \(None there, 200 here\)"):
        run(replace(shard(asked, 2, 2, asked.out), scoring=replace(asked.scoring, max_length=200)))
    # same name, same size, another letter: a shard does not hash the whole corpus, but notices when it reads the row
    Path(asked.corpus.path).write_bytes(Path(asked.corpus.path).read_bytes().replace(b"Question 9:", b"Question 8:"))
    with pytest.raises(InputError, match="has changed since the run began"):
        run(shard(asked, 2, 2, asked.out))


def test_locks_let_shards_of_one_number_in_and_nobody_else(asked: RunOptions) -> None:
    folder = RunFolder(asked.out)
    folder.create()
    with folder.locked((1, 2)):
        assert folder.working()
        with pytest.raises(InputError, match="shard 1/2 is already at work"):
            run(shard(asked, 1, 2, asked.out))
        with pytest.raises(InputError, match="shards of one run have one number"):
            run(shard(asked, 1, 3, asked.out))
        for alone in (lambda: run(asked), lambda: recut(asked.out, CutOptions())):
            with pytest.raises(InputError, match=r"in use|holds no run"):
                alone()
        assert run(shard(asked, 2, 2, asked.out))
        with pytest.raises(InputError, match="in use"):
            recut(asked.out, CutOptions())
    assert not folder.working()
    with folder.locked(), pytest.raises(InputError, match="in use by another gradshield-fast that is no shard"):
        run(shard(asked, 1, 2, asked.out))


def truncated(data: bytes) -> bytes:
    return data[:-9]


def flipped(data: bytes) -> bytes:
    middle = len(data) // 3
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [truncated, flipped, lambda data: b"", lambda data: b"PAR1"])
def test_a_damaged_part_is_scored_anew(asked: RunOptions, damage: Callable[[bytes], bytes]) -> None:
    run(asked)
    whole = files(asked.out)
    part, other = (asked.out / "scores" / f"part-0000{n}.parquet" for n in (2, 5))
    part.write_bytes(damage(part.read_bytes()))
    other.write_bytes((asked.out / "scores" / "part-00001.parquet").read_bytes())
    notes = Notes()
    assert run(asked, notes)
    assert files(asked.out) == whole
    assert [text.split(" is damaged")[0] for text in notes.texts] == [part.name, other.name]


def test_every_flipped_byte_is_noticed_or_harmless(asked: RunOptions) -> None:
    from gradshield_fast.pipeline.parts import part_path, why_unreadable

    run(replace(asked, cut=None))
    folder = RunFolder(asked.out)
    manifest = read_manifest(folder)
    assert manifest is not None
    path, whole = part_path(folder, 0), read_parts(folder, 1)
    data = path.read_bytes()
    harmless = 0
    for at in range(0, len(data), 17):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x04]) + data[at + 1 :])
        if why_unreadable(path, manifest.units[0]) is None:
            harmless += 1
            assert read_parts(folder, 1).fihs.tobytes() == whole.fihs.tobytes()
    assert harmless < len(data) / 17 / 3


def test_outputs_that_were_lost_are_written_again(asked: RunOptions) -> None:
    run(asked)
    whole = files(asked.out)
    (asked.out / "kept.jsonl").unlink()
    assert run(asked)
    assert files(asked.out) == whole


def test_a_folder_that_may_not_be_written_is_one_line(asked: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for name in ("mkdir", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(*((Path, name) if name == "mkdir" else (os, name)), refuse)
            with pytest.raises(InputError, match=r"cannot write .*: Permission denied; choose an output folder"):
                run(asked)
    assert run(asked)


def test_a_worker_does_not_outlive_its_parent(asked: RunOptions) -> None:
    """SIGKILL leaves a process no time to end its workers: they look themselves."""
    script = f"""
import os, sys, time
from pathlib import Path
from gradshield_fast.chat import ChatEncoder
from gradshield_fast.corpus_files import find_files
from gradshield_fast.loading import load_tokenizer
from gradshield_fast.pipeline.encoding import Encoding
from gradshield_fast.pipeline.options import CorpusOptions, ModelOptions
from gradshield_fast.pipeline.units import cut_units
if __name__ == "__main__":
    corpus, model = CorpusOptions(Path({str(asked.corpus.path)!r})), ModelOptions({asked.model.name!r}, device="cpu")
    units = cut_units(find_files(corpus.path), 10**6, 8, lambda _: None)
    encoding = Encoding(corpus, model, ChatEncoder(load_tokenizer(model.name)), workers=1)
    encoding.take(units[0])
    print(*encoding._pool._processes, flush=True)
    time.sleep(100)
"""
    path = Path(asked.corpus.path).with_name("parent.py")
    path.write_text(script)
    parent = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    for _ in range(200):
        if not Path(f"/proc/{worker}").exists() and not _alive(worker):
            return
        time.sleep(0.05)
    pytest.fail("the worker is still there")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
