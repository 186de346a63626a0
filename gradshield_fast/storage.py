"""Where a corpus lies, on this machine or behind an fsspec URL (s3://, gs://, ...): found and read, never written.

A path is text: a local path, or a URL. `file://` URLs are local paths. What is not local is read by the package that
fsspec names for it, which is installed apart: s3fs, gcsfs, adlfs, huggingface_hub.
"""

from __future__ import annotations

import glob
import io
import os
import posixpath
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import IO, Any, ParamSpec, TypeVar

from gradshield_fast.errors import InputError

P = ParamSpec("P")
T = TypeVar("T")

_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
    "hf": "huggingface_hub",
    "http": "aiohttp requests",
    "https": "aiohttp requests",
}
_REMOTE_BLOCK = 8 << 20


def is_url(path: str | Path) -> bool:
    """Say whether a path is a URL of something that is not local.

    Args:
        path: a path.

    Returns:
        Whether fsspec has to read it.
    """
    return "://" in str(path) and not str(path).startswith("file://")


def plain_path(path: str | Path) -> str:
    """Write a path as text, without `file://`.

    Args:
        path: a path.

    Returns:
        A local path or a URL.
    """
    return os.fspath(path).removeprefix("file://")


def absolute(path: str | Path) -> str:
    """Write a path so that it means the same from another folder.

    Args:
        path: a path.

    Returns:
        An absolute local path, or the URL.
    """
    text = plain_path(path)
    return text if is_url(text) else str(Path(text).absolute())


def file_name(path: str) -> str:
    """Give the last part of a path.

    Args:
        path: a local path or a URL.

    Returns:
        Its name.
    """
    return posixpath.basename(path.rstrip("/")) if is_url(path) else Path(path).name


def join(folder: str, name: str) -> str:
    """Name something in a folder.

    Args:
        folder: a local path or a URL.
        name: relative to it, with slashes.

    Returns:
        Its path.
    """
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else str(Path(folder) / name)


def _guarded(read: Callable[P, T]) -> Callable[P, T]:
    """Turn whatever a remote file system raises into one line; there is no common base of their errors."""

    @wraps(read)
    def inner(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return read(*args, **kwargs)
        except InputError:
            raise
        except Exception as error:
            if not is_url(str(args[0])):
                raise
            raise InputError(f"corpus {args[0]} cannot be opened: {one_line(error)}") from error

    return inner


def one_line(error: BaseException) -> str:
    """Shorten an error's message.

    Args:
        error: any.

    Returns:
        One line of at most 300 characters, which names the error's type if it says nothing else.
    """
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


@_guarded
def kind_of(path: str) -> str:
    """Say what is at a path.

    Args:
        path: a local path or a URL.

    Returns:
        "file", "folder", "other" (a pipe, a device), or "" for nothing.

    Raises:
        InputError: the file system cannot be asked.
    """
    if is_url(path):
        files, inside = _filesystem(path)
        return "folder" if files.isdir(inside) else "file" if files.isfile(inside) else ""
    local = Path(path)
    if local.is_dir():
        return "folder"
    return "file" if local.is_file() else "other" if local.exists() else ""


@_guarded
def names_in(folder: str) -> list[str]:
    """List the files right in a folder.

    Args:
        folder: a local path or a URL.

    Returns:
        Their names, sorted.

    Raises:
        InputError: it cannot be listed.
    """
    if is_url(folder):
        files, inside = _filesystem(folder)
        entries = files.ls(inside, detail=True)
        return sorted(file_name(f"x://{entry['name']}") for entry in entries if entry["type"] == "file")
    return sorted(path.name for path in Path(folder).iterdir() if path.is_file())


@_guarded
def matches(pattern: str) -> tuple[str, list[str]]:
    """Expand `*`, `?`, `[...]` and `**`.

    Args:
        pattern: a local path or a URL.

    Returns:
        The folder before the first of these, and the matching files' names relative to it, sorted.

    Raises:
        InputError: the file system cannot be asked.
    """
    parts = pattern.split("/")
    first = next(n for n, part in enumerate(parts) if glob.has_magic(part))
    root = "/".join(parts[:first])
    rest = "/".join(parts[first:])
    if is_url(pattern):
        files, inside = _filesystem(root)
        base = inside.rstrip("/") + "/"
        found = [path.removeprefix(base) for path in files.glob(base + rest) if files.isfile(path)]
        return root, sorted(found)
    root = root or ("/" if pattern.startswith("/") else ".")
    names = glob.glob(rest, root_dir=root, recursive=True)
    return root, sorted(name.replace(os.sep, "/") for name in names if (Path(root) / name).is_file())


def has_magic(path: str) -> bool:
    """Say whether a path is a pattern.

    Args:
        path: a local path or a URL.

    Returns:
        Whether it holds `*`, `?` or `[`.
    """
    return glob.has_magic(path)


@_guarded
def open_binary(path: str) -> IO[bytes]:
    """Open a file for reading; it can be positioned.

    Args:
        path: a local path or a URL.

    Returns:
        A stream of bytes, to be closed.

    Raises:
        InputError: a remote file cannot be opened; a local one raises OSError.
    """
    if is_url(path):
        files, inside = _filesystem(path)
        return files.open(inside, "rb", block_size=_REMOTE_BLOCK)
    return io.FileIO(path, "rb")  # type: ignore[return-value]  # a raw stream, buffered by who reads it


@_guarded
def size_of(path: str) -> int:
    """Give the size of a file.

    Args:
        path: a local path or a URL.

    Returns:
        Bytes.

    Raises:
        InputError: a remote file cannot be asked for; a local one raises OSError.
    """
    if is_url(path):
        files, inside = _filesystem(path)
        return int(files.size(inside) or 0)
    return Path(path).stat().st_size


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    protocol = url.split("://", 1)[0]
    try:
        files, inside = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        package = _PACKAGES.get(protocol)
        advice = f"install it with: pip install {package}" if package else "expected a protocol that fsspec knows"
        raise InputError(f"corpus {url}: {protocol}:// cannot be read here ({one_line(error)}); {advice}") from error
    return files, str(inside)
