"""Files in a folder in which others may have put anything: links, FIFOs, sockets, folders, files of somebody else.

Nothing here follows a link below the folder, waits for another process, or trusts a name.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lmc.errors import Corrupt

FILE_MODE = 0o600
FOLDER_MODE = 0o700
_PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_NOT_A_FILE = "what stands under the chunk's name is not a regular file"
_NO_FILE = (errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ENODEV)


@contextmanager
def folder(path: str) -> Iterator[int]:
    """A descriptor to open entries by. Raises OSError, NotADirectoryError also for a link to a folder."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def open_to_read(parent: str, name: str) -> int:
    """Open a regular file. Raises OSError, and Corrupt when something else stands there."""
    with folder(parent) as dir_fd:
        try:
            fd = os.open(name, os.O_RDONLY | _PLAIN, dir_fd=dir_fd)
        except OSError as error:
            if error.errno in _NO_FILE:
                raise Corrupt(_NOT_A_FILE) from None
            raise
    with ExitStack() as opened:
        opened.callback(os.close, fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise Corrupt(_NOT_A_FILE)
        opened.pop_all()
    return fd


def is_file(parent: str, name: str) -> bool:
    """Raises OSError."""
    try:
        with folder(parent) as dir_fd:
            return stat.S_ISREG(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def make_folders(top: str, *below: str) -> str:
    """Make top, whose links are its owner's affair, and folders below it, of which none may be a link. Returns the last. Raises OSError."""
    try:
        Path(top).mkdir(FOLDER_MODE, parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), top) from None
    path = top
    for name in below:
        path = f"{path}/{name}"
        try:
            Path(path).mkdir(FOLDER_MODE)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
    return path


def replace_by_folder(path: str) -> bool:
    """Make a folder, in the place of whatever else stands there; False when it was there already. Raises OSError."""
    try:
        Path(path).mkdir(FOLDER_MODE)
    except FileExistsError:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            return False
        Path(path).unlink()
        Path(path).mkdir(FOLDER_MODE)
    return True


def move_over(source: str, parent: str, name: str) -> None:
    """Give a file its name, whatever had it before. Raises OSError, and Corrupt when a folder with something in it stands there."""
    with folder(parent) as dir_fd:
        try:
            os.rename(source, name, dst_dir_fd=dir_fd)
        except IsADirectoryError:
            _remove_folder(name, dir_fd)
            os.rename(source, name, dst_dir_fd=dir_fd)


def remove(parent: str, name: str) -> int:
    """Remove an entry, a link itself and not what it names; returns the bytes of a file. Absent is fine. Raises as move_over()."""
    try:
        with folder(parent) as dir_fd:
            status = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                _remove_folder(name, dir_fd)
                return 0
            os.unlink(name, dir_fd=dir_fd)
            return status.st_size if stat.S_ISREG(status.st_mode) else 0
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _remove_folder(name: str, dir_fd: int) -> None:
    try:
        os.rmdir(name, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise Corrupt("a folder that is not empty stands under the chunk's name; remove it") from None
        raise
