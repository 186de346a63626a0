"""The whole-model benchmarks run to their end on a tiny model, count right, and outlive a peer that does not."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import corpus
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks import floor
from benchmarks.forwards import forwards
from benchmarks.peers.process import PeerFailed, PeerProcess
from benchmarks.peers.table import agreement
from benchmarks.workload import FILES, PeakMemory, batches_of, linear_weights, open_model, read_rows, tokens_of

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--rows", 6, "--max-length", 64, "--probes", 2, "--threads", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in FILES:
        corpus(folder / f"{name}.jsonl", 5)
    return folder


def run(script: str, *args: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_rows_come_from_every_file(tiny_model: Path, data: Path) -> None:
    _, tokenizer = open_model(str(tiny_model), "float32")
    rows = read_rows(data, tokenizer, 6, 64)
    assert len(rows) == 6
    assert all(row.response_tokens for row in rows)
    assert sum(len(batch.positions) for batch in batches_of(rows, 64)) == 6


def test_the_floor_counts_what_torch_counts(tiny_model: Path) -> None:
    model, _ = open_model(str(tiny_model), "float32")
    model.requires_grad_(False)
    tokens, response = 24, 7
    embedded = torch.randn(1, tokens, model.config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        model.get_output_embeddings()(hidden[0, :response]).sum().backward()
    found = counter.get_flop_counts()["Global"]
    products = sum(found[op] for op in (torch.ops.aten.mm, torch.ops.aten.addmm) if op in found)
    assert floor.operations(model, tokens, response) == products


def test_the_floor_multiplies_every_linear_layer_once_a_pass(tiny_model: Path, data: Path) -> None:
    model, tokenizer = open_model(str(tiny_model), "float32")
    rows = read_rows(data, tokenizer, 6, 64)
    with FlopCounterMode(display=False) as counter:
        assert floor.seconds(model, batches_of(rows, 128)) > 0
    assert counter.get_total_flops() == floor.operations(model, *tokens_of(rows))


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")  # of torch.compile's imports, where no test came first
def test_forward_passes_agree(tiny_model: Path, data: Path) -> None:
    model, tokenizer = open_model(str(tiny_model), "float32")
    batches = batches_of(read_rows(data, tokenizer, 6, 64), 128)
    stock, response_only = (torch.cat(call()) for call in forwards(model, batches, compiled=False).values())
    torch.testing.assert_close(stock, response_only)


def test_peak_memory_sees_an_allocation() -> None:
    with PeakMemory() as memory:
        torch.ones(32 << 20)
    if memory.extra is not None:
        assert 100 < memory.extra < 400


def test_agreement_is_with_the_weights_covered() -> None:
    truth = [{"all": [float(n), 10.0], "linear": [float(-n), 1.0]} for n in range(4)]
    held = agreement([0.0, -1.0, -2.0, -3.5], truth, "linear")
    assert held["spearman"] == pytest.approx(1)
    assert held["max_error"] == pytest.approx(0.5)
    assert held["spearman_all_weights"] == pytest.approx(-1)


def test_linear_weights_leave_the_head_out(tiny_model: Path) -> None:
    names = linear_weights(AutoModelForCausalLM.from_pretrained(tiny_model))
    assert len(names) == 14
    assert not any("lm_head" in name or "embed" in name for name in names)


def test_end_to_end(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    options = (*SMALL, "--model", tiny_model, "--data", data, "--rounds", 2, "--batch-tokens", 128)
    more = ("--no-compiled-forward", "--rank", 2, "--directions", 3, "--norms", "--profile")
    done = run("end_to_end.py", *options, *more, "--results", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "Self CPU" in done.stdout
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    result = json.loads(line)
    assert len(result["seconds"]["scoring"]) == 2
    assert result["share_of_floor"]["median"] > 0
    assert result["best_forward"] in result["forward_tokens_per_s"]
    assert str(tmp_path) not in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and all of it would run")
def test_without_a_gpu_its_benchmarks_say_so() -> None:
    done = run("bench_gpu.py")
    assert (done.returncode, done.stdout.count("\n")) == (2, 1)
    assert "no GPU on this machine" in done.stdout


def test_the_cost_model_is_what_its_script_prints() -> None:
    assert run("cost_model.py").stdout == (ROOT / "benchmarks" / "COST_MODEL.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_peers_side_by_side(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    toys = [f"toy_peers:{name}" for name in ("Sound", "Raises", "NeedsSmallBatches", "Dies")]
    options = (*SMALL, "--model", tiny_model, "--data", data, "--work", tmp_path / "work", "--rounds", 1)
    command = (*options, "--tune-rows", 3, "--results", tmp_path / "out", "--peer-python", sys.executable)
    first = run("peers/run.py", *command, "--peers", *toys, "--stop-after", "batches")
    assert first.returncode == 0, first.stderr
    assert not (tmp_path / "out.jsonl").exists()
    done = run("peers/run.py", *command, "--peers", *toys)  # goes on where the first call stopped
    assert done.returncode == 0, done.stderr
    assert "batch sizes" not in done.stdout
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    peers = json.loads(line)["peers"]
    for name in ("toy_peers:Sound", "toy_peers:NeedsSmallBatches"):
        assert len(peers[name]["seconds"]) == 1
        assert peers[name]["agreement"]["max_error"] < 1e-5
    assert peers["toy_peers:NeedsSmallBatches"]["batch_tokens"] == 64
    assert peers["toy_peers:Raises"] == {"error": "ValueError: no such layer"}
    assert peers["toy_peers:Dies"] == {"error": "its process ended (signal 9): out of memory, says somebody"}
    assert "cannot run: ValueError: no such layer" in done.stdout


def test_a_peer_that_hangs_is_ended(tmp_path: Path) -> None:
    start = time.monotonic()
    with (
        PeerProcess(sys.executable, tmp_path / "log", timeout=0.5) as process,
        pytest.raises(PeerFailed, match="no answer within"),
    ):
        process.ask(do="load", peer="toy_peers:Sound", work=str(tmp_path), dtype="float32", threads=1)
    assert time.monotonic() - start < 30
    assert process.process.poll() is not None


def test_a_peer_that_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    with (
        PeerProcess(sys.executable, tmp_path / "log", timeout=120) as process,
        pytest.raises(PeerFailed, match="FileNotFoundError"),
    ):
        process.ask(do="load", peer="no_such_module:Peer", work=str(tmp_path), dtype="float32", threads=1)
