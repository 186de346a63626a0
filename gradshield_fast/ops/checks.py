"""Argument checks that every op shares; each message names the op, the rule, what came and what to do."""

from __future__ import annotations

import torch

from gradshield_fast.errors import InputError

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


def accumulate_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Give the dtype that an op accumulates and answers in.

    Args:
        tensors: the op's floating-point inputs.

    Returns:
        float64 where any input is float64 (the oracle's precision), else float32.
    """
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def need_tensor(op: str, name: str, x: object) -> None:
    """Require a dense tensor, whose strides say where its elements lie.

    Args:
        op: the op's name, for the message.
        name: the argument's name, for the message.
        x: the argument.

    Raises:
        InputError: `x` is something else.
    """
    if not isinstance(x, torch.Tensor):
        raise InputError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    # dynamo does not let an autograd Function ask for it, and would cut the graph in two; what it traces is dense
    if not torch.compiler.is_compiling() and x.layout != torch.strided:
        raise InputError(f"{op}: {name} must be dense, got {x.layout}; call to_dense() on it")


def need_matrix(op: str, name: str, x: torch.Tensor) -> None:
    """Require a floating-point matrix.

    Args:
        op: the op's name, for the message.
        name: the argument's name, for the message.
        x: the argument.

    Raises:
        InputError: `x` is not two-dimensional or not floating point.
    """
    need_tensor(op, name, x)
    if x.ndim != 2:
        raise InputError(f"{op}: {name} must be a matrix, got shape {tuple(x.shape)}")
    need_float(op, name, x)


def need_float(op: str, name: str, x: torch.Tensor) -> None:
    """Require a floating-point tensor of any shape.

    Args:
        op: the op's name, for the message.
        name: the argument's name, for the message.
        x: the argument.

    Raises:
        InputError: `x` is not floating point.
    """
    need_tensor(op, name, x)
    if x.dtype not in FLOAT_DTYPES:
        raise InputError(f"{op}: {name} must be float32, float16, bfloat16 or float64, got {x.dtype}")


def need_index(op: str, name: str, x: torch.Tensor) -> None:
    """Require a vector of ids or labels; their values are checked when the op runs.

    Args:
        op: the op's name, for the message.
        name: the argument's name, for the message.
        x: the argument.

    Raises:
        InputError: `x` is not a vector of int32 or int64.
    """
    need_tensor(op, name, x)
    if x.ndim != 1 or x.dtype not in INDEX_DTYPES:
        raise InputError(f"{op}: {name} must be a vector of int32 or int64, got {x.dtype} of shape {tuple(x.shape)}")


def need_ids(op: str, name: str, ids: torch.Tensor, columns: int) -> None:
    """Require that ids name columns that exist. On a GPU they are not looked at: it would cost a synchronisation.

    Args:
        op: the op's name, for the message.
        name: the argument's name, for the message.
        ids: Int[Tensor, "tokens"].
        columns: how many there are.

    Raises:
        InputError: an id is negative or too large.
    """
    if ids.device.type == "cpu" and ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < columns):
        raise InputError(f"{op}: {name} must lie in 0..{columns - 1}, got {int(ids.min())}..{int(ids.max())}")


def need_same_tokens(op: str, **tensors: torch.Tensor) -> int:
    """Require the same number of tokens and one device.

    Args:
        op: the op's name, for the message.
        tensors: name -> tensor whose first axis is the tokens.

    Returns:
        The number of tokens.

    Raises:
        InputError: two of them disagree.
    """
    (first, x), *rest = tensors.items()
    for name, y in rest:
        if y.shape[0] != x.shape[0]:
            raise InputError(f"{op}: {first} has {x.shape[0]} tokens, but {name} has {y.shape[0]}")
    need_one_device(op, **tensors)
    return x.shape[0]


def need_one_device(op: str, **tensors: torch.Tensor) -> None:
    """Require that tensors lie on one device.

    Args:
        op: the op's name, for the message.
        tensors: name -> tensor.

    Raises:
        InputError: two of them lie apart.
    """
    (first, x), *rest = tensors.items()
    for name, y in rest:
        if y.device != x.device:
            raise InputError(f"{op}: {first} is on {x.device}, but {name} is on {y.device}; move one of them")


def need_cu_seqlens(op: str, cu_seqlens: torch.Tensor, like: torch.Tensor, name: str = "cu_seqlens") -> None:
    """Require the form of row boundaries: a vector of int32 or int64. Their values are `need_boundaries`'s.

    Args:
        op: the op's name, for the message.
        cu_seqlens: Int32[Tensor, "examples+1"].
        like: a tensor on the device where the op runs; boundaries may lie there or on the CPU.
        name: the argument's name, for the message.

    Raises:
        InputError: it is not of that form, or on a third device.
    """
    need_tensor(op, name, cu_seqlens)
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in INDEX_DTYPES:
        raise InputError(
            f"{op}: {name} must be a vector of int32 or int64 with one more entry than there are examples, "
            f"got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.device.type != "cpu" and cu_seqlens.device != like.device:
        raise InputError(
            f"{op}: {name} is on {cu_seqlens.device}, but the inputs are on {like.device}; move one of them"
        )


def need_boundaries(op: str, cu_seqlens: torch.Tensor, tokens: int, name: str = "cu_seqlens") -> None:
    """Require that row boundaries start at 0, never fall and end at the number of tokens.

    On a GPU they are not looked at, since that would cost a synchronisation.

    Args:
        op: the op's name, for the message.
        cu_seqlens: Int32[Tensor, "examples+1"].
        tokens: the number of tokens of the op's inputs.
        name: the argument's name, for the message.

    Raises:
        InputError: the boundaries are not of that form.
    """
    if cu_seqlens.device.type != "cpu":
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0:
        raise InputError(f"{op}: {name} must start at 0, got {first}")
    if last != tokens:
        raise InputError(
            f"{op}: {name} must end at the number of tokens: got {last}, but there are {tokens} tokens. "
            "Was the last token lost in packing?"
        )
    if bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
        at = int((cu_seqlens[1:] < cu_seqlens[:-1]).nonzero()[0])
        raise InputError(
            f"{op}: {name} must never fall: entry {at + 1} is {int(cu_seqlens[at + 1])} after {int(cu_seqlens[at])}"
        )
