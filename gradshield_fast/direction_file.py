"""A direction on disk: safetensors, with its origin as JSON metadata."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gradshield_fast.errors import InputError
from gradshield_fast.lowrank import LowRank

FORMAT = "gradshield_fast.direction.1"


def write(path: Path, parts: Sequence[dict[str, torch.Tensor | LowRank]], head: dict[str, Any]) -> None:
    """Write a direction beside its place and rename it.

    Args:
        path: the file; an existing one is replaced at the end.
        parts: one mapping a direction, weight's name -> entry.
        head: JSON values to keep with them.

    Raises:
        InputError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for k, part in enumerate(parts):
        for name, entry in part.items():
            if isinstance(entry, LowRank):
                tensors[f"{k}/p/{name}"], tensors[f"{k}/q/{name}"] = entry.p, entry.q
            else:
                tensors[f"{k}/r/{name}"] = entry
    tensors = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        save_file(tensors, temporary, metadata={"direction": json.dumps({"format": FORMAT, **head})})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot write the direction: {reason}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def read(path: Path) -> tuple[list[dict[str, torch.Tensor | LowRank]], dict[str, Any]]:
    """Read a direction that `write` wrote, or any safetensors file of weight's name -> tensor.

    Args:
        path: the file.

    Returns:
        The parts, and what `write` was given as head; an empty head for a plain file.

    Raises:
        InputError: the file is missing or not of that form.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"{path}: no such direction file; make one with `gradshield-fast direction`")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        # one key: several are written in an order that changes from run to run; older files have the format beside it
        head = json.loads(metadata.get("direction", "{}"))
        if FORMAT not in (head.get("format"), metadata.get("format")) or not head:
            return [dict(tensors)], {}
        parts: list[dict[str, torch.Tensor | LowRank]] = [{} for _ in range(head["count"])]
        for key, tensor in tensors.items():
            k, kind, name = key.split("/", 2)
            if kind == "p":
                parts[int(k)][name] = LowRank(tensor, tensors[f"{k}/q/{name}"])
            elif kind == "r":
                parts[int(k)][name] = tensor
        if not all(parts):
            raise ValueError("a direction has no tensors")
    except (SafetensorError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a readable direction file ({error}); make the direction again") from error
    return parts, head


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
