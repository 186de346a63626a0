"""A model's fingerprint: what a saved direction was made for."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SAMPLES = 1024
"""Elements read from each weight, evenly spaced: enough to tell two trainings apart, cheap on any size of model."""


def model_fingerprint(model: torch.nn.Module) -> str:
    """Hash the names, shapes and a sample of the values of every weight.

    Values are rounded to bfloat16 first, so that one checkpoint loaded as float32 or as bfloat16 hashes the same.

    Args:
        model: the model.

    Returns:
        64 hexadecimal digits (SHA-256).
    """
    import torch

    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name}:{tuple(weight.shape)};".encode())
        flat = weight.detach().flatten()
        step = max(1, flat.numel() // SAMPLES)
        sample = flat[::step][:SAMPLES]
        if sample.is_floating_point():
            sample = sample.to(torch.bfloat16).view(torch.int16)
        digest.update(sample.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
