"""Files that appear whole or not at all, and one line where they cannot."""

from __future__ import annotations

import contextlib
import errno
import os
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
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(target.parent)
    except OSError as error:
        raise cannot_write(target, error) from error


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
