"""The least that scoring can cost: the matrix products of one forward and one backward pass to the activations.

Of each linear layer inside the blocks two products a token, y = a W^T and dL/da = g W; of the head the same, on
response tokens alone. Left out, so that no method can gain by it: attention's own products, the direction's products,
norms, activations, the loss.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.workload import IGNORE, synchronize
from gradshield_fast.packing import Batch


def matrices(model: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Find the weights that the products are made with.

    Args:
        model: a causal language model whose linear layers are `torch.nn.Linear`.

    Returns:
        Weights of the blocks, in order, each as often as it is used; and the head's, [vocabulary, d].
    """
    head = model.get_output_embeddings()
    blocks = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return blocks, head.weight


def operations(model: Any, tokens: int, response_tokens: int) -> int:
    """Count floating-point operations, a multiplication and an addition each.

        2 passes * 2 * (tokens * sum d_in d_out + response_tokens * vocabulary * d)

    Args:
        model: the model.
        tokens: tokens that go through the blocks.
        response_tokens: tokens with a loss.

    Returns:
        The operations of the floor.
    """
    blocks, head = matrices(model)
    return 4 * (tokens * sum(weight.numel() for weight in blocks) + response_tokens * head.numel())


def counts(batch: Batch) -> tuple[int, int]:
    """Count a batch's tokens.

    Args:
        batch: packed rows.

    Returns:
        Real tokens, and those with a loss.
    """
    return int(batch.attention_mask.sum()), int((batch.labels != IGNORE).sum())


@torch.no_grad()
def seconds(model: Any, batches: Sequence[Batch]) -> float:
    """Time exactly these products, with the model's own weights, type and numbers of tokens, and nothing else.

    The weights are walked through in the order of a forward and then of a backward pass, so caches are as cold as
    they would be there.

    Args:
        model: the model.
        batches: packed rows; padding is not multiplied.

    Returns:
        Seconds for all batches.
    """
    blocks, head = matrices(model)
    widths = {width for weight in [*blocks, head] for width in weight.shape}
    tokens = max(counts(batch)[0] for batch in batches)
    # values do not matter to the clock, but zeros and subnormals would
    inputs = {width: torch.randn(tokens, width, device=head.device).to(head.dtype) for width in widths}
    synchronize()
    start = time.perf_counter()
    for batch in batches:
        n, response = counts(batch)
        for weight in blocks:
            torch.mm(inputs[weight.shape[1]][:n], weight.T)
        torch.mm(inputs[head.shape[1]][:response], head.T)
        torch.mm(inputs[head.shape[0]][:response], head)
        for weight in reversed(blocks):
            torch.mm(inputs[weight.shape[0]][:n], weight)
    synchronize()
    return time.perf_counter() - start
