"""The Ray engine on a local cluster of several nodes: the same bytes, also when a worker and a node are lost."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import corpus

from gradshield_fast.errors import GradShieldError, InputError
from gradshield_fast.pipeline.options import DirectionOptions, EngineOptions, ModelOptions, RunOptions
from gradshield_fast.pipeline.progress import Reporter
from gradshield_fast.pipeline.run import run
from tests.pipeline.folder_files import files

pytestmark = [
    pytest.mark.slow,
    # Ray's own, about sockets and files of the processes that it starts
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and two machines, all of them processes on this one."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            made.add_node(num_cpus=1)
        root = str(Path(__file__).parents[2])
        paths = {"PYTHONPATH": os.pathsep.join([root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])}
        ray.init(address=made.address, log_to_driver=False, runtime_env={"env_vars": paths})
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


class Disturb(Reporter):
    """Kills an actor after some rows, and takes a machine away after some more."""

    def __init__(self, cluster: Any, out: Path) -> None:
        self.cluster, self.out, self.rows, self.notes = cluster, out, 0, []
        self.title = ""

    def stage(self, title: str, total: int | None = None, unit: str = "rows", done: int = 0) -> None:
        self.title = title

    def advance(self, count: int, tokens: int = 0) -> None:
        if self.title != "scoring":
            return
        before, self.rows = self.rows, self.rows + count
        if before < 40 <= self.rows:
            for pid in self.actors()[:1]:
                os.kill(pid, signal.SIGKILL)
        if before < 120 <= self.rows:
            self.cluster.remove_node(sorted(self.cluster.worker_nodes, key=lambda node: node.node_ip_address)[0])

    def actors(self) -> list[int]:
        [log] = (self.out / "sessions").glob("*.jsonl")
        lines = log.read_text().splitlines()
        return [int(line.split('"worker": "')[1].split('"')[0].split(":")[1]) for line in lines if '"unit"' in line]

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.skipif((os.cpu_count() or 1) < 4, reason="Ray takes minutes to notice a lost machine on under four cores")
def test_a_cluster_that_loses_an_actor_and_a_machine_leaves_the_same_bytes(
    cluster: Any, asked: RunOptions, tmp_path: Path
) -> None:
    corpus(asked.corpus.path, 400)
    asked = replace(asked, engine=EngineOptions(threads=1))
    run(asked)
    out = tmp_path / "ray"
    disturb = Disturb(cluster, out)
    assert run(replace(asked, out=out, engine=EngineOptions(kind="ray", threads=1)), disturb)
    assert disturb.rows == 400
    assert sum("lost" in note for note in disturb.notes) >= 2, disturb.notes
    assert files(out) == files(asked.out)


def test_what_an_actor_raises_comes_out_as_it_is(cluster: Any, asked: RunOptions, tmp_path: Path) -> None:
    ray = EngineOptions(kind="ray", threads=1)
    with pytest.raises(GradShieldError, match="abacus"):
        run(replace(asked, model=replace(asked.model, device="abacus"), engine=ray))
    missing = DirectionOptions(files=(tmp_path / "nothing.safetensors",))
    with pytest.raises(InputError, match=r"nothing\.safetensors"):
        run(replace(asked, direction=missing, engine=ray))
    with pytest.raises(InputError, match="no room for an actor"):
        run(replace(asked, engine=replace(ray, threads=64)))
    with pytest.raises(InputError, match="cuda or auto"):
        run(replace(asked, model=ModelOptions(asked.model.name, device="cuda:1"), engine=ray))


def test_without_ray_it_says_how_to_get_it(asked: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'gradshield_fast\[ray\]'"):
        run(replace(asked, engine=EngineOptions(kind="ray")))
