"""Fine-tune every weight of a small model on the CPU: float32 weights, of which the model runs a bfloat16 copy."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradshield_fast.batches import PaddedBatch, padded_batch
from gradshield_fast.chat import Encoded
from gradshield_fast.loading import load_model
from gradshield_fast.response_logprob import token_logprobs


@dataclass(frozen=True)
class Settings:
    """How a model is fine-tuned.

    Attributes:
        lr: peak learning rate of AdamW; it rises over the first twentieth of the steps and falls to zero, linearly.
        epochs: passes over the rows.
        batch_rows: rows of a step.
        seed: of the order.
    """

    lr: float
    epochs: int
    batch_rows: int
    seed: int = 0


@dataclass(frozen=True)
class Report:
    """What a fine-tuning took.

    Attributes:
        rows: rows that could be trained on.
        steps: optimizer steps.
        tokens: tokens seen.
        seconds: wall time.
        cpu_seconds: processor time of this process, which other programs do not lengthen by much.
        loss_first: mean loss of the first tenth of the steps, nats a token.
        loss_last: the same of the last tenth.
    """

    rows: int
    steps: int
    tokens: int
    seconds: float
    cpu_seconds: float
    loss_first: float
    loss_last: float


def load_start(name: str) -> tuple[Any, Any]:
    """Load a model to train, in float32 and with attention that is fast for short rows on a CPU.

    Args:
        name: what `gradshield_fast.loading.load_model` takes.

    Returns:
        The model, its weights held plainly (transformers refuses to cast what it has read from GGUF), and its
        tokenizer.
    """
    from transformers import AutoModelForCausalLM

    read, tokenizer = load_model(name, dtype="float32", device="cpu")
    if not hasattr(read.config, "quantization_config"):
        return read, tokenizer
    del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    return model.eval(), tokenizer


def collate(rows: Sequence[Encoded]) -> PaddedBatch:
    """Pad rows to the longest.

    Args:
        rows: their tokens.

    Returns:
        The batch.
    """
    width = max(len(row.input_ids) for row in rows)
    fill = lambda x, pad: x + [pad] * (width - len(x))  # noqa: E731
    batch = {
        "input_ids": torch.tensor([fill(row.input_ids, 0) for row in rows]),
        "labels": torch.tensor([fill(row.labels, -100) for row in rows]),
        "attention_mask": torch.tensor([fill([1] * len(row.input_ids), 0) for row in rows]),
    }
    return padded_batch(batch, torch.device("cpu"), None)


def batches(lengths: Sequence[int], rows: int, seed: int) -> list[list[int]]:
    """Cut a shuffled corpus into batches of rows of similar length.

    Args:
        lengths: tokens of every row.
        rows: rows of a batch.
        seed: of the two shuffles.

    Returns:
        Row numbers of every batch: a pool of 8 batches at a time is sorted by length, then the batches are shuffled.
    """
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    cut = []
    for start in range(0, len(order), 8 * rows):
        some = sorted(order[start : start + 8 * rows], key=lengths.__getitem__)
        cut += [some[i : i + rows] for i in range(0, len(some), rows)]
    rng.shuffle(cut)
    return cut


def fit(
    model: torch.nn.Module,
    rows: Sequence[Encoded],
    settings: Settings,
    after_step: Callable[[int, int], bool] | None = None,
) -> Report:
    """Fine-tune a model.

    The loss of a step is the mean over its rows' response tokens. Gradients are clipped at norm 1, there is no weight
    decay. Where the processor has bf16 products the copy is faster than autocast and holds half the activations.

    Args:
        model: float32 model; changed in place, left in bfloat16 and in evaluation mode.
        rows: what to learn; rows without a response within their length are left out.
        settings: how.
        after_step: called with (steps done, steps in all) and the model in evaluation mode; True ends the fine-tuning.

    Returns:
        What it took.
    """
    usable = [row for row in rows if row.usable]
    lengths = [len(row.input_ids) for row in usable]
    plan = [b for e in range(settings.epochs) for b in batches(lengths, settings.batch_rows, settings.seed * 1000 + e)]
    own = [weight.detach().clone() for weight in model.parameters()]
    optimizer = torch.optim.AdamW(own, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    warmup = max(1, len(plan) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (len(plan) - step) / max(1, len(plan) - warmup))
    )
    model.bfloat16()
    losses: list[float] = []
    tokens, start, cpu = 0, time.perf_counter(), time.process_time()
    for step, picks in enumerate(plan):
        model.train()
        batch = collate([usable[i] for i in picks])
        loss = -token_logprobs(model, batch)[0].mean()
        loss.backward()
        for master, weight in zip(own, model.parameters(), strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        with torch.no_grad():
            for master, weight in zip(own, model.parameters(), strict=True):
                weight.copy_(master)
        schedule.step()
        losses.append(float(loss.detach()))
        tokens += sum(lengths[i] for i in picks)
        model.eval()
        if after_step is not None and after_step(step + 1, len(plan)):
            break
    few = max(1, len(losses) // 10)
    return Report(
        rows=len(usable),
        steps=len(losses),
        tokens=tokens,
        seconds=round(time.perf_counter() - start, 1),
        cpu_seconds=round(time.process_time() - cpu, 1),
        loss_first=sum(losses[:few]) / few,
        loss_last=sum(losses[-few:]) / few,
    )
