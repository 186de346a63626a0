"""Teach a small chat model to refuse, so that its safety score means something; seeds are fixed.

    python benchmarks/replication/align.py --data DATA --out aligned

SmolLM2-135M-Instruct answers nearly every harmful prompt. This script fine-tunes all its weights on refusals of harmful
prompts mixed with ordinary instruction rows, so that it learns to tell the two apart, and says what it achieved: the
share of held-out harmful prompts that the model refuses, and the share of safe prompts that it refuses too.

Rows, by file of the data folder (DATA, or the environment variable GRADSHIELD_SHARED_DATA):

    refused   prompts of refusals.jsonl, of catqa_prompts.jsonl (but the policy topics), every other one of
              harmbench_prompts.jsonl
    answered  instruct_apache_1k.jsonl[:450], gsm8k_train_2k.jsonl[:120], dolly_1k.jsonl[:250]
    held out  the other harmbench_prompts.jsonl, all of advbench_520.jsonl and xstest_250.jsonl, and what is left
              of the answered files: nothing that benchmarks/replication/separation.py measures is trained on

No answer to a harmful prompt is printed or stored: only rates are.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from gradshield_fast.answers import AnswerEncoder
from gradshield_fast.batches import padded_batch
from gradshield_fast.chat import ChatEncoder
from gradshield_fast.errors import GradShieldError, InputError
from gradshield_fast.refusal import refuses
from gradshield_fast.response_logprob import token_logprobs

OPENING = "I cannot fulfill this request."
REASONS = (
    "",
    "It could cause serious harm to other people.",
    "It is dangerous and against the law.",
    "If you are in trouble, please reach out to someone you trust.",
    "",
    "The answer could be used to hurt someone.",
    "I will not take part in something harmful or illegal.",
    "Please consider a lawful and safe way to reach your goal.",
    "",
    "It would put people in danger.",
    "I am an AI assistant, and I do not help with harmful activities.",
    "I would be glad to help with something safe instead.",
)
"""How a refusal goes on. All begin alike, as those of chat models do."""

POLICY_TOPICS = ("Political Campaigning", "Tailored Financial Advice", "Adult Content / Adult-themed humor")


def read_jsonl(folder: Path, name: str) -> list[dict[str, Any]]:
    """Read one file of the data folder.

    Args:
        folder: the data folder.
        name: the file's name without its ending.

    Returns:
        Its rows.

    Raises:
        InputError: the file is missing.
    """
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the data folder with --data or GRADSHIELD_SHARED_DATA")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def training_rows(folder: Path, refusal_passes: int) -> list[tuple[str, str]]:
    """Collect the rows of the fine-tuning, as the module's docstring lists them.

    Args:
        folder: the data folder.
        refusal_passes: how often each harmful prompt comes, each time with the next reason.

    Returns:
        (prompt, response) of every row.
    """
    questions = read_jsonl(folder, "catqa_prompts")
    harmful = [row["prompt"] for row in questions if not row["category"].startswith(POLICY_TOPICS)]
    harmful += [row["prompt"] for row in read_jsonl(folder, "harmbench_prompts")[::2]]
    harmful += dict.fromkeys(row["messages"][0]["content"] for row in read_jsonl(folder, "refusals"))
    rows = [
        (prompt, f"{OPENING} {REASONS[(i + turn) % len(REASONS)]}".strip())
        for turn in range(refusal_passes)
        for i, prompt in enumerate(harmful)
    ]
    chats = read_jsonl(folder, "instruct_apache_1k")[:450]
    chats += read_jsonl(folder, "gsm8k_train_2k")[:120]
    chats += read_jsonl(folder, "dolly_1k")[:250]
    return rows + [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in chats]


def batches(lengths: Sequence[int], rows: int, seed: int) -> list[list[int]]:
    """Cut a shuffled corpus into batches of rows of similar length.

    Args:
        lengths: tokens of every row.
        rows: rows of a batch.
        seed: of the two shuffles.

    Returns:
        Row numbers of every batch: a pool of 32 batches at a time is sorted by length, then the batches are shuffled.
    """
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    cut = []
    for start in range(0, len(order), 32 * rows):
        pool = sorted(order[start : start + 32 * rows], key=lengths.__getitem__)
        cut += [pool[i : i + rows] for i in range(0, len(pool), rows)]
    rng.shuffle(cut)
    return cut


def train(
    model: torch.nn.Module, encoder: ChatEncoder, rows: list[tuple[str, str]], options: argparse.Namespace
) -> dict[str, Any]:
    """Fine-tune every weight with AdamW on float32 weights, of which the model runs a bfloat16 copy.

    On a CPU with bf16 matrix products the copy is half again as fast as autocast, and holds half the activations.
    The learning rate rises and falls linearly.

    Args:
        model: float32 model; changed in place.
        encoder: its chat encoder.
        rows: (prompt, response) of every row.
        options: seed, epochs, lr, batch_rows.

    Returns:
        Steps, tokens, seconds and the mean loss of the first and last 20 steps, in nats a token.
    """
    encoded = [e for e in (encoder.encode_prompt_response(*row) for row in rows) if e.response_tokens > 0]
    lengths = [len(e.input_ids) for e in encoded]
    plan = [b for epoch in range(options.epochs) for b in batches(lengths, options.batch_rows, options.seed + epoch)]
    master = [weight.detach().clone() for weight in model.parameters()]
    optimizer = torch.optim.AdamW(master, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    warmup = max(1, len(plan) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (len(plan) - step) / (len(plan) - warmup))
    )
    model.bfloat16().train()
    losses, tokens, start = [], 0, time.perf_counter()
    for step, picks in enumerate(plan):
        width = max(len(encoded[i].input_ids) for i in picks)
        fill = lambda x, pad, width=width: x + [pad] * (width - len(x))  # noqa: E731
        batch = padded_batch(
            {
                "input_ids": torch.tensor([fill(encoded[i].input_ids, 0) for i in picks]),
                "labels": torch.tensor([fill(encoded[i].labels, -100) for i in picks]),
                "attention_mask": torch.tensor([fill([1] * len(encoded[i].input_ids), 0) for i in picks]),
            },
            torch.device("cpu"),
            None,
        )
        loss = -token_logprobs(model, batch)[0].mean()
        loss.backward()
        for own, weight in zip(master, model.parameters(), strict=True):
            assert weight.grad is not None
            own.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(master, 1.0)
        optimizer.step()
        with torch.no_grad():
            for own, weight in zip(master, model.parameters(), strict=True):
                weight.copy_(own)
        schedule.step()
        losses.append(float(loss.detach()))
        tokens += sum(len(encoded[i].input_ids) for i in picks)
        if step % 10 == 0 or step + 1 == len(plan):
            speed = tokens / (time.perf_counter() - start)
            print(f"step {step + 1}/{len(plan)}  loss {losses[-1]:.3f} nats/token  {speed:.0f} tokens/s", flush=True)
    model.float().eval()
    with torch.no_grad():
        for own, weight in zip(master, model.parameters(), strict=True):
            weight.copy_(own)
    head, tail = losses[:20], losses[-20:]
    return {
        "rows": len(encoded),
        "steps": len(plan),
        "tokens": tokens,
        "seconds": round(time.perf_counter() - start, 1),
        "loss_first": sum(head) / len(head),
        "loss_last": sum(tail) / len(tail),
    }


def check(model: Any, tokenizer: Any, folder: Path, count: int) -> dict[str, float]:
    """Measure refusals on held-out prompts.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        folder: the data folder.
        count: prompts of each kind, spread evenly over the file.

    Returns:
        Share of greedy answers that begin like a refusal, on held-out harmful prompts and on safe ones, by source.
    """
    safe = [row["prompt"] for row in read_jsonl(folder, "xstest_250") if row["label"] == "safe"]
    prompts = {
        "advbench": [row["messages"][0]["content"] for row in read_jsonl(folder, "advbench_520")],
        "harmbench_held_out": [row["prompt"] for row in read_jsonl(folder, "harmbench_prompts")[1::2]],
        "xstest_safe": safe,
        "instruct_held_out": [row["messages"][0]["content"] for row in read_jsonl(folder, "instruct_apache_1k")[796:]],
    }
    encoder = AnswerEncoder(tokenizer)
    rates = {}
    for name, rows in prompts.items():
        size = min(count, len(rows))
        some = [rows[i * len(rows) // size] for i in range(size)]
        starts = [encoder.start(prompt, OPENING, name) for prompt in some]
        with torch.autocast("cpu", torch.bfloat16):
            rates[name] = round(sum(refuses(model, tokenizer, starts)) / len(some), 4)
    return rates


def load(name: str) -> tuple[Any, Any]:
    """Load the model to train, in float32.

    Args:
        name: what `gradshield_fast.loading.load_model` takes.

    Returns:
        The model and its tokenizer.
    """
    from gradshield_fast.loading import load_model

    return load_model(name, dtype="float32", device="cpu")


def main(argv: list[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        Exit code.

    Raises:
        InputError: there is no data folder, or the output folder is not empty.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-demo", help="model folder or name")
    parser.add_argument("--data", default=os.environ.get("GRADSHIELD_SHARED_DATA"), help="data folder")
    parser.add_argument("--out", type=Path, help="folder to write the model to; without it only the check runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--refusal-passes", type=int, default=2, help="times each harmful prompt comes in an epoch")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate")
    parser.add_argument("--batch-rows", type=int, default=10)
    parser.add_argument("--max-tokens", type=int, default=192, help="rows are cut there")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", type=int, default=48, help="prompts of each kind to check on; 0: no check")
    options = parser.parse_args(argv)
    if options.data is None:
        raise InputError("align: give the data folder with --data or GRADSHIELD_SHARED_DATA")
    folder = Path(options.data)
    if options.out is not None and options.out.exists() and any(options.out.iterdir()):
        raise InputError(f"align: {options.out} is not empty; give another folder with --out")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model, tokenizer = load(options.model)
    model.set_attn_implementation("eager")  # for rows of this length faster than sdpa on the CPU
    # folders of the machine it runs on are nobody else's business
    names = {"data": folder.name, "model": Path(options.model).name, "out": options.out and options.out.name}
    record: dict[str, Any] = {"options": {**vars(options), **names}}
    if options.check:
        record["before"] = check(model.eval(), tokenizer, folder, options.check)
        print(f"refusal rates before: {record['before']}", flush=True)
    if options.out is None:
        return 0
    rows = training_rows(folder, options.refusal_passes)
    record["rows_sha256"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    encoder = ChatEncoder(tokenizer, max_length=options.max_tokens)
    record["training"] = train(model, encoder, rows, options)
    record["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    model.save_pretrained(options.out, safe_serialization=True)
    tokenizer.save_pretrained(options.out)
    if options.check:
        record["after"] = check(model, tokenizer, folder, options.check)
        print(f"refusal rates after: {record['after']}", flush=True)
    (options.out / "align.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"saved {options.out}")
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        try:
            sys.exit(main())
        except GradShieldError as error:
            sys.exit(f"error: {error}")
