"""Files that appear whole or not at all, and one line where they cannot."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from gradshield_fast.errors import InputError


def write_whole(target: Path, content: bytes) -> None:
    """Write a file so that it is seen complete or not at all, and lasts through a power cut.

    Args:
        target: the file, replaced if it is there.
        content: its bytes.

    Raises:
        InputError: it cannot be written; the file is then as it was.
    """
    _write(target, content, os.replace)


def write_once(target: Path, content: bytes) -> bool:
    """Write a file unless it is there; of two that try at once, on whatever machines, one succeeds.

    Args:
        target: the file, which is seen complete or not at all.
        content: its bytes.

    Returns:
        Whether it was written; False: it was there, or another was faster.

    Raises:
        InputError: it cannot be written.
    """
    if target.exists():
        return False
    try:
        _write(target, content, _link)
    except FileExistsError:
        return False
    return True


def _write(target: Path, content: bytes, publish: Callable[[Path, Path], None]) -> None:
    # not the process's number alone: shards on several machines share the folder
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        try:
            with open(temporary, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            publish(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(target.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise cannot_write(target, error) from error


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        # a file system without hard links: the callers' locks are what keeps two from doing this at once
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        os.replace(source, target)


def cannot_write(path: Path, error: OSError) -> InputError:
    """Say on one line why a file could not be written, and what to do.

    Args:
        path: the file.
        error: what the system said.

    Returns:
        The error to raise.
    """
    advice = "choose another output folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = "free some space and run the same command again, or choose another output folder"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "choose an output folder that you may write to"
    elif error.errno in (errno.EEXIST, errno.ENOTDIR):
        advice = "a file is in the way of the folder: choose another one"
    return InputError(f"cannot write {path}: {error.strerror or error}; {advice}")


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there.

    Args:
        path: which.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last through a power cut, where the system can.

    Args:
        folder: the folder.
    """
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
