"""A million rows through the whole pipeline with a tiny model: what everything but the model costs, in time and memory.

The corpus is made of real rows: cut at random lengths, joined to conversations of two and three answers, numbered so
that they differ; one row in fifty says exactly what an earlier one says, one in a thousand is broken. The model is
random, a layer of 16 channels, with a tokenizer trained on the rows. The memory is that of the command and its worker
processes together (proportional set size), sampled twice a second.

    python benchmarks/million_rows.py --data DATA --rows 20000
    python benchmarks/million_rows.py --data DATA --rows 1000000 --record
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

FILES = ("gsm8k_train_2k", "instruct_apache_1k", "dolly_1k", "banking77_1k", "mts_dialog_1k", "wikisql_1k")
BROKEN = (b'{"messages": [', b'{"prompt": "\xff", "response": "x"}', b"[]", b'{"messages": []}')


def real_rows(data: Path) -> list[list[dict[str, str]]]:
    """Read the turns of the shared rows."""
    rows = []
    for name in FILES:
        with open(data / f"{name}.jsonl", encoding="utf-8") as file:
            rows += [json.loads(line)["messages"] for line in file]
    return rows


def write_corpus(path: Path, source: list[list[dict[str, str]]], rows: int, seed: int) -> None:
    """Write rows of varied lengths; the same seed writes the same bytes."""
    chance = random.Random(seed)
    said: list[bytes] = []
    with open(path, "wb") as file:
        for number in range(rows):
            kind = chance.random()
            if kind < 0.001:
                file.write(chance.choice(BROKEN) + b"\n")
                continue
            if kind < 0.021 and said:
                turns = chance.choice(said)
            else:
                turns = json.dumps(conversation(source, chance, number)).encode()
                if len(said) < 10_000:
                    said.append(turns)
            file.write(b'{"id": "row-%d", "messages": %s}\n' % (number, turns))


def conversation(source: list[list[dict[str, str]]], chance: random.Random, number: int) -> list[dict[str, str]]:
    """Join one to three real rows, the answers cut after a random number of words."""
    turns: list[dict[str, str]] = []
    for _ in range(chance.choice((1, 1, 1, 1, 1, 1, 2, 3))):
        asked, answered = source[chance.randrange(len(source))][-2:]
        words = answered["content"].split(" ")
        turns += [asked, {**answered, "content": " ".join(words[: chance.randint(1, 60)])}]
    turns[0] = {**turns[0], "content": f"Case {number}. {turns[0]['content']}"}
    return turns


def make_model(folder: Path, source: list[list[dict[str, str]]]) -> None:
    """Save a random model of one narrow layer, its tokenizer and a random direction over it."""
    import torch
    from toy_tokenizers import CHATML, trained_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    from gradshield_fast import Direction

    texts = [turn["content"] for turns in source for turn in turns]
    tokenizer = trained_tokenizer(texts, 4096, CHATML)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    Direction({name: torch.randn_like(w) for name, w in model.named_parameters()}).save(folder / "d.safetensors")


def memory(pid: int) -> int:
    """Sum the memory of a process and of what it started, shared pages split among those that share them."""
    total, pending = 0, [pid]
    while pending:
        here = pending.pop()
        try:
            lines = Path(f"/proc/{here}/smaps_rollup").read_text().splitlines()
            children = Path(f"/proc/{here}/task/{here}/children").read_text().split()
        except OSError:
            continue
        total += next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
        pending += map(int, children)
    return total


def timed(command: list[str]) -> tuple[float, int, list[dict[str, Any]]]:
    """Run a command; give its seconds, its peak memory in bytes, and its steps with the second each began at."""
    begun, peak, steps = time.perf_counter(), 0, []
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen(command, stderr=said, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            time.sleep(0.5)
            peak = max(peak, memory(process.pid))
        seconds = time.perf_counter() - begun
        said.seek(0)
        text = said.read()
    if process.returncode not in (0, 1):
        raise SystemExit(f"the run failed with code {process.returncode}: {text[-2000:]}")
    for line in text.splitlines():
        if line.startswith("{"):
            entry = json.loads(line)
            if entry.get("event") == "stage":
                steps.append(entry)
    return seconds, peak, steps


def main() -> None:
    """Make the corpus, run the command, print and record what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the shared rows")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=1, help="processes that encode ahead of the scorer")
    parser.add_argument("--threads", type=int, default=1, help="threads of the scorer")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="add a line to benchmarks/results/million_rows.jsonl")
    options = parser.parse_args()
    source = real_rows(options.data)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        make_model(home / "model", source)
        write_corpus(home / "corpus.jsonl", source, options.rows, options.seed)
        size = (home / "corpus.jsonl").stat().st_size
        command = [sys.executable, "-m", "gradshield_fast", "filter", str(home / "corpus.jsonl"), "--out"]
        command += [str(home / "run"), "--model", str(home / "model"), "--device", "cpu", "--log-json"]
        command += ["--direction", str(home / "model" / "d.safetensors"), "--batch-tokens", str(options.batch_tokens)]
        command += ["--workers", str(options.workers), "--threads", str(options.threads)]
        seconds, peak, steps = timed(command)
        run = json.loads((home / "run" / "run.json").read_text())
        counts = run["counts"]
        assert counts["kept"] + counts["dropped"] + counts["unscored"] == options.rows
        told = {
            "rows": options.rows,
            "corpus_bytes": size,
            "seconds": round(seconds, 1),
            "rows_per_second": round(options.rows / seconds, 1),
            "peak_bytes": peak,
            "tokens": sum(session["tokens"] for session in run["sessions"]),
            "scoring_seconds": round(sum(session["seconds"] for session in run["sessions"]), 1),
            "duplicates": run["duplicates"],
            "counts": {name: counts[name] for name in ("kept", "dropped", "unscored")},
            "steps": steps,
        }
    print(json.dumps(told, indent=1))
    if options.record:
        record.append("million_rows", {**record.surroundings(vars(options)), **told})


if __name__ == "__main__":
    main()
