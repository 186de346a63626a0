"""Every way there is to score rows by <row gradient, direction>, side by side, each in a process of its own.

    make bench-peers ARGS="--data DATA [--model MODEL] [--dtype bfloat16] [--rows 64] [--rounds 3] [--peers NAME ...]"

Same rows, model, type, threads and direction. First the truth is worked out (autograd in float64), then each peer
tries a few batch sizes on some of the rows and keeps the fastest, then peers take turns, round by round; a peer's
process loads, warms up and is timed on all rows. A peer that cannot run is listed with its error.

Progress is kept in the work folder, so a run that was stopped goes on: `--budget 60` stops by itself after a minute
(exit code 3: run it again). One JSON line goes to benchmarks/results/peers.jsonl at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.peers.oracle import truths
from benchmarks.peers.process import ROOT, PeerFailed, PeerProcess
from benchmarks.peers.table import BASELINE, lines, results
from benchmarks.record import append, surroundings
from benchmarks.workload import add_options, data_folder, open_model, probe_direction, read_rows

PEERS = {
    BASELINE: "benchmarks.peers.autograd_loop:AutogradLoop",
    "vmap": "benchmarks.peers.func_vmap:Vmap",
    "forward_mode": "benchmarks.peers.forward_mode:ForwardMode",
    "bergson": "benchmarks.peers.with_bergson:Exact",
    "bergson_projected": "benchmarks.peers.with_bergson:Projected",
    "bergson_output": "benchmarks.peers.with_bergson:OutputInfluence",
    "kronfluence": "benchmarks.peers.with_kronfluence:Exact",
    "kronfluence_rank16": "benchmarks.peers.with_kronfluence:Rank16",
    "dattri": "benchmarks.peers.with_dattri:Exact",
    "ours_rank16": "benchmarks.peers.ours:Rank16",
    "ours_rank16_compiled": "benchmarks.peers.ours:Rank16Compiled",
    "ours_dense": "benchmarks.peers.ours:Dense",
    "ours_rank16_linear": "benchmarks.peers.ours:Rank16Linear",
    "ours_dense_linear": "benchmarks.peers.ours:DenseLinear",
}
PACKAGES = ("bergson", "kronfluence", "dattri")
WORSE = 1.15
"""Larger batches are not tried once one is slower than the best so far by this factor."""


class Run:
    """The work folder's state: what has been tried, timed and failed."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Open the state of an earlier call, if there is one.

        Args:
            options: the command line's.
        """
        self.options, self.folder = options, Path(options.work)
        self.path = self.folder / f"state-{options.dtype}.json"
        empty: dict[str, Any] = {"tried": {}, "covers": {}, "errors": {}, "rounds": {}}
        self.state = json.loads(self.path.read_text()) if self.path.is_file() else empty

    def save(self) -> None:
        """Write the state, whole or not at all."""
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.state))
        part.replace(self.path)

    def steps(self) -> Iterator[tuple[str, int | None]]:
        """List what is still to do.

        Yields:
            A peer's name, and the round, or None where its batch size is still to be found.
        """
        peers = self.options.peers
        yield from ((name, None) for name in peers if name not in self.state["covers"] and not self._failed(name))
        for number in range(self.options.rounds):
            for name in peers:
                if len(self.state["rounds"].get(name, [])) <= number and not self._failed(name):
                    yield name, number

    def _failed(self, name: str) -> bool:
        return name in self.state["errors"]

    def step(self, name: str, number: int | None) -> None:
        """Do one thing with one peer.

        Args:
            name: the peer.
            number: the round, or None to find its batch size.
        """
        try:
            with PeerProcess(self.options.peer_python, self.folder / f"{name}.log", self.options.timeout) as process:
                about = process.ask(
                    do="load",
                    peer=PEERS.get(name, name),
                    work=str(self.folder),
                    dtype=self.options.dtype,
                    threads=self.options.threads,
                )
                if number is None:
                    self._find_batch(name, about, process)
                else:
                    best = min(self.state["tried"][name], key=lambda pair: pair[1])[0]
                    out = self.folder / f"scores-{name}-{self.options.dtype}.json"
                    answer = process.ask(do="score", batch_tokens=best, first=None, out=str(out))
                    answer["scores"] = json.loads(out.read_text())
                    self.state["rounds"].setdefault(name, []).append({**answer, "batch_tokens": best})
        except PeerFailed as error:
            self.state["errors"][name] = str(error)
        self.save()

    def _find_batch(self, name: str, about: dict[str, Any], process: PeerProcess) -> None:
        self.state["covers"][name] = about["covers"]
        tried: list[tuple[int, float]] = []
        sizes = about["batch_tokens"]
        for size in sizes:
            if len(sizes) == 1:
                tried.append((size, 0.0))
                break
            try:
                out = str(self.folder / f"tried-{name}.json")
                answer = process.ask(do="score", batch_tokens=size, first=self.options.tune_rows, out=out)
            except PeerFailed:
                if not tried:
                    raise
                break  # a larger batch does not fit; what did fit is kept
            tried.append((size, answer["seconds"]))
            if answer["seconds"] > WORSE * min(seconds for _, seconds in tried):
                break
        self.state["tried"][name] = tried


def prepare(options: argparse.Namespace, data: Path) -> None:
    """Write the rows and the direction, both made with float32 weights, once a work folder.

    Args:
        options: the command line's.
        data: the data folder.
    """
    folder = Path(options.work)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {key: getattr(options, key) for key in ("model", "rows", "max_length", "probes")}
    about = folder / "work.json"
    if about.is_file():
        found = json.loads(about.read_text())["options"]
        if found != wanted:
            sys.exit(f"{folder} holds a run with other options ({found}); finish it, remove it or give another --work")
        return
    model, tokenizer = open_model(options.model, "float32", options.threads)
    rows = read_rows(data, tokenizer, options.rows, options.max_length)
    probe_direction(model, tokenizer, options.probes).save(folder / "direction.safetensors")
    pairs = [[row.input_ids, row.labels] for row in rows]
    about.write_text(json.dumps({"model": options.model, "options": wanted, "rows": pairs}))


def versions(python: str) -> dict[str, str]:
    """Ask the peers' environment which versions it has.

    Args:
        python: its interpreter.

    Returns:
        Package -> version, for those that are there.
    """
    code = (
        "import importlib.metadata as m, json\n"
        f"names = [d.name for d in m.distributions() if d.name in {PACKAGES}]\n"
        "print(json.dumps({name: m.version(name) for name in names}))"
    )
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return json.loads(found.stdout) if found.returncode == 0 else {}


def parse() -> tuple[argparse.Namespace, Path]:
    """Read the command line.

    Returns:
        The options and the data folder.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, rows=64)
    own = ROOT / ".venv-peers" / "bin" / "python"
    parser.add_argument("--peers", nargs="+", default=list(PEERS), metavar="NAME", help=", ".join(PEERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tune-rows", type=int, default=12, help="rows that batch sizes are tried on")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "peers", help="folder of the run's state")
    parser.add_argument("--peer-python", default=str(own) if own.is_file() else sys.executable)
    parser.add_argument("--budget", type=float, default=None, help="seconds after which to stop, to be run again")
    parser.add_argument("--stop-after", choices=("prepare", "truth", "batches"), default=None)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that one answer of a peer may take")
    parser.add_argument("--results", default="peers", help="name of the file in benchmarks/results, or a path")
    options = parser.parse_args()
    unknown = [name for name in options.peers if name not in PEERS and ":" not in name]
    if unknown:
        parser.error(f"no such peer: {', '.join(unknown)}; there are {', '.join(PEERS)}")
    return options, data_folder(parser, options)


def main() -> None:
    """Do what is left to do, then print and record."""
    options, data = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the peer that is running ends as well
    end = time.monotonic() + options.budget if options.budget else float("inf")
    prepare(options, data)
    if options.stop_after == "prepare":
        return
    truth = truths(Path(options.work), options.dtype, options.threads, end)
    if truth is None:
        sys.exit(3)
    if options.stop_after == "truth":
        return
    run = Run(options)
    for name, number in list(run.steps()):
        if number is not None and options.stop_after == "batches":
            return
        if time.monotonic() > end:
            sys.exit(3)
        if name in run.state["errors"]:
            continue
        run.step(name, number)
        what = run.state["errors"].get(name) or (
            run.state["tried"][name] if number is None else f"{run.state['rounds'][name][-1]['seconds']:.2f} s"
        )
        print(f"{name} {'batch sizes' if number is None else f'round {number + 1}'}: {what}", flush=True)
    report(run, truth)


def report(run: Run, truth: list[dict[str, list[float]]]) -> None:
    """Print the table and record the run.

    Args:
        run: the finished run.
        truth: of each row.
    """
    work = json.loads((run.folder / "work.json").read_text())
    tokens = sum(len(ids) for ids, _ in work["rows"])
    response = sum(x != -100 for _, labels in work["rows"] for x in labels)
    if run.options.threads:
        torch.set_num_threads(run.options.threads)
    outcome = results(run.state, run.options.peers, truth, tokens)
    print(f"{len(truth)} rows, {tokens} tokens, {response} with a loss, {run.options.dtype}")
    print("\n".join(lines(outcome)))
    about = surroundings({k: v for k, v in vars(run.options).items() if k not in ("work", "peer_python", "budget")})
    about["versions"].update(versions(run.options.peer_python))
    about["cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    line = {**about, "rows": len(truth), "tokens": tokens, "response_tokens": response, "peers": outcome}
    append(run.options.results, line)


if __name__ == "__main__":
    main()
