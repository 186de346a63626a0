"""What decides a run's scores, as hashes: two runs that differ in it never share a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradshield_fast
from gradshield_fast import storage
from gradshield_fast.corpus import corpus_fingerprint
from gradshield_fast.corpus_files import find_files
from gradshield_fast.errors import InputError
from gradshield_fast.model_source import resolve
from gradshield_fast.pipeline.options import CorpusOptions, DirectionOptions, ModelOptions, RunOptions

_EDGE = 1 << 20


def identity(options: RunOptions, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Describe a run by content, before anything heavy is loaded; where files lie does not matter.

    Args:
        options: the run.
        known: the corpus's entry in an identity; its hashes are taken over where files have the same names and sizes.

    Returns:
        Nested JSON values; equal for two runs that give the same scores.
    """
    scoring = asdict(options.scoring)
    del scoring["verify"]
    scoring["template"] = _text_digest(options.scoring.template)
    corpus = options.corpus
    return {
        "version": gradshield_fast.__version__,
        "corpus": {
            **(_same_files(corpus, known) or corpus_fingerprint(corpus.path, corpus.format)),
            "format": corpus.format,
            "columns": dict(corpus.columns) if corpus.columns else None,
            "max_row_bytes": corpus.max_row_bytes,
        },
        "model": _model(options.model),
        "direction": _direction(options.direction),
        "scoring": scoring,
    }


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name what differs between two identities.

    Args:
        there: the one in the folder.
        here: the one asked for.
        prefix: path of keys that leads to both.

    Returns:
        Entries such as "scoring.batch_tokens (2048 there, 4096 here)"; hashes only as "corpus.sha256 (...)".
    """
    out = []
    for key in dict.fromkeys([*there, *here]):
        a, b = there.get(key), here.get(key)
        if a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += differences(a, b, f"{prefix}{key}.")
        else:
            out.append(f"{prefix}{key} ({_short(a)} there, {_short(b)} here)")
    return out


def file_digest(path: Path) -> str:
    """Hash a file's content.

    Args:
        path: the file.

    Returns:
        64 hexadecimal digits (SHA-256).

    Raises:
        InputError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as stream:
            while chunk := stream.read(_EDGE):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _same_files(corpus: CorpusOptions, known: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if known is None:
        return None
    there = [(file.name, storage.size_of(file.path)) for file in find_files(corpus.path, corpus.format)]
    if there != [(file["name"], file["size"]) for file in known["files"]]:
        return None
    return {"files": known["files"], "sha256": known["sha256"]}


def _model(options: ModelOptions) -> dict[str, Any]:
    return {
        "files": _model_files(options.name, options.allow_pickle),
        "adapter": _folder_digest(Path(options.adapter).expanduser(), options.adapter) if options.adapter else None,
        "dtype": options.dtype,
        "device": options.device,
    }


def _model_files(name: str, allow_pickle: bool) -> str:
    source = resolve(name, allow_pickle=allow_pickle)
    if source.gguf:
        return _edges([Path(source.location) / source.gguf])
    return _folder_digest(Path(source.location), name)


def _folder_digest(folder: Path, name: str) -> str:
    if not folder.is_dir():
        return f"hub:{name}"
    wanted = (".json", ".safetensors", ".model", ".jinja", ".bin", ".txt")
    return _edges(sorted(path for path in folder.iterdir() if path.suffix in wanted and path.is_file()))


def _edges(paths: list[Path]) -> str:
    """Hash names, sizes and the first and last MiB: another training changes those, and 100 GB are not read twice."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            size = path.stat().st_size
            with open(path, "rb") as stream:
                head = stream.read(_EDGE)
                stream.seek(max(_EDGE, size - _EDGE))
                tail = stream.read(_EDGE)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
        digest.update(f"{path.name}\0{size}\0".encode("utf-8", "surrogateescape"))
        digest.update(head)
        digest.update(tail)
    return digest.hexdigest()


def _direction(options: DirectionOptions) -> dict[str, Any]:
    shape = {"rank": options.rank, "energy": options.energy}
    if options.files:
        return {"files": [file_digest(path) for path in options.files], **shape}
    return {
        "probes": file_digest(options.probes) if options.probes else "bundled",
        "score": options.score,
        "weights": options.weights,
        "second_moment": file_digest(options.second_moment) if options.second_moment else None,
        "batch_tokens": options.batch_tokens,
        "allow_unaligned": options.allow_unaligned,
        "passes": options.passes,
        **shape,
    }


def _text_digest(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
