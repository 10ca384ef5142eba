"""The namespaces that share a disk folder: who uses them, what they take, and which go when the folder is full.

Each model, layout or setting has a namespace of its own, so each upgrade leaves the chunks of before behind. disk.capacity is the folder's:
when it is reached, chunks of namespaces that nobody uses go first, those of the one that was used least recently before others. A tier that
is open holds a shared lock (flock) on the file `lease` in its namespace, whose time says when it was opened or closed last.
"""

from __future__ import annotations

import fcntl
import os
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lmc.cache.tiers.files import FILE_MODE
from lmc.cache.tiers.format import FORMAT
from lmc.errors import TierFull
from lmc.units import format_size

LEASE = "lease"
TEMPORARY = "tmp"
_LEASE_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_PARTS = 16  # the folder is measured again when so large a part of its capacity was written
_BATCH = 64  # and when it is full, so large a part of it is freed at once
_AGAIN = 5.0  # seconds between two measurements of a folder that stays full


@dataclass(frozen=True)
class NamespaceUse:
    label: str
    chunks: int
    num_bytes: int
    used: float  # when it was opened or closed last, in seconds since 1970
    open: bool  # some process uses it


def take_lease(namespace: str) -> int:
    """Hold the folder of a namespace against its removal; returns the descriptor to close. Raises OSError."""
    while True:
        fd = os.open(f"{namespace}/{LEASE}", _LEASE_FLAGS | os.O_CREAT, FILE_MODE)
        with ExitStack() as opened:
            opened.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_SH)  # who has it alone removes some files, and then gives it back
            if os.fstat(fd).st_nlink:  # else the namespace was removed meanwhile
                os.utime(fd)
                opened.pop_all()
                return fd


def list_namespaces(folder: Path) -> list[NamespaceUse]:
    """Of a disk folder, the least recently used first. Raises OSError."""
    found = []
    for namespace in _folders(f"{folder}/{FORMAT}"):
        sizes = [size for rank in _folders(namespace.path) for _, size, _ in _chunks(rank.path)]
        found.append(NamespaceUse(namespace.name, len(sizes), sum(sizes), _used(namespace), _is_open(namespace.path)))
    return sorted(found, key=lambda one: one.used)


class FolderShare:
    """How much one rank may still write to a disk folder: its share of the capacity, less what lies in the folders of its number.

    A rank whose number is beyond those of this engine left its chunks to the rank that has the same rest. On the second node of an engine
    the numbers begin with num_ranks.
    """

    def __init__(self, folder: Path, namespace: str, rank: int, num_ranks: int, capacity: int) -> None:
        self._root = f"{folder}/{FORMAT}"
        self._namespace = namespace
        self._rank = rank
        self._num_ranks = num_ranks
        self._capacity = capacity // num_ranks
        self._lock = threading.Lock()
        self._room = 0
        self._until_measured = 0  # bytes to write before the folder is measured again; others write, too
        self._full_until = 0.0
        self._writing: dict[str, int] = {}  # name of a file under way -> its bytes

    def begin(self, name: str, num_bytes: int) -> None:
        """Before a file of this name and size is written; end() follows. Raises TierFull when there is no room, and OSError."""
        with self._lock:
            self._until_measured -= num_bytes
            if self._until_measured < 0:
                self._measure()
            if self._room < num_bytes and time.monotonic() >= self._full_until:
                self._measure()
                if self._room < num_bytes:
                    self._room += self._free(num_bytes - self._room + self._capacity // _BATCH)
                self._full_until = 0.0 if self._room >= num_bytes else time.monotonic() + _AGAIN
            if self._room < num_bytes:
                raise TierFull(f"the folder holds its capacity of {format_size(self._capacity)} per rank")
            self._room -= num_bytes
            self._writing[name] = (
                self._writing.get(name, 0) + num_bytes
            )  # a write that hangs may be done again beside it

    def end(self, name: str, num_bytes: int, *, kept: bool) -> None:
        """The file is there, or it was not written after all."""
        with self._lock:
            self._writing[name] -= num_bytes
            if self._writing[name] == 0:
                del self._writing[name]
            if not kept:
                self._room += num_bytes

    def give(self, num_bytes: int) -> None:
        """A file of that size was removed."""
        with self._lock:
            self._room += num_bytes

    def _measure(self) -> None:
        taken = sum(size for namespace in _folders(self._root) for size in self._sizes(namespace.path))
        self._room = self._capacity - taken - sum(self._writing.values())
        self._until_measured = self._capacity // _PARTS

    def _sizes(self, namespace: str) -> Iterator[int]:
        """Bytes of each file, without those that this rank is writing: they are counted while they are under way."""
        temporary = f"{self._root}/{self._namespace}/r{self._rank}/tmp/"
        for rank in _folders(namespace):
            if self._is_mine(rank.name):
                for _, size, path in _chunks(rank.path):
                    if not path.startswith(temporary) and path.rsplit("/", 1)[1] not in self._writing:
                        yield size

    def _is_mine(self, rank: str) -> bool:
        return rank[:1] == "r" and rank[1:].isdigit() and (int(rank[1:]) - self._rank) % self._num_ranks == 0

    def _free(self, wanted: int) -> int:
        """Remove chunks of namespaces that nobody uses, oldest first; returns the bytes freed."""
        freed = 0
        others = [one for one in _folders(self._root) if one.name != self._namespace]
        for namespace in sorted(others, key=_used):
            if freed >= wanted:
                break
            with _alone_in(namespace.path) as alone:
                if alone:
                    freed += self._remove_oldest(namespace.path, wanted - freed)
        return freed

    def _remove_oldest(self, namespace: str, wanted: int) -> int:
        ranks = [rank.path for rank in _folders(namespace) if self._is_mine(rank.name)]
        freed = 0
        for _, size, path in sorted(chunk for rank in ranks for chunk in _chunks(rank)):
            if freed >= wanted:
                return freed
            with suppress(OSError):  # another user's, or made immutable: it stays
                Path(path).unlink()
                freed += size
        for rank in ranks:
            _remove_if_empty(rank)
        if not _folders(namespace):
            with suppress(OSError):
                Path(namespace, LEASE).unlink()
            _remove_if_empty(namespace)
        return freed


@contextmanager
def _alone_in(namespace: str) -> Iterator[bool]:
    """False while some process uses the namespace."""
    fd = os.open(f"{namespace}/{LEASE}", _LEASE_FLAGS | os.O_CREAT, FILE_MODE)
    try:
        yield _lock_alone(fd)
    finally:
        os.close(fd)


def _lock_alone(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_open(namespace: str) -> bool:
    try:
        fd = os.open(f"{namespace}/{LEASE}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _lock_alone(fd)
    finally:
        os.close(fd)


def _used(namespace: os.DirEntry[str]) -> float:
    try:
        return os.lstat(f"{namespace.path}/{LEASE}").st_mtime
    except OSError:
        return namespace.stat(follow_symlinks=False).st_mtime


def _folders(path: str) -> list[os.DirEntry[str]]:
    """The folders in a folder, no links; none when it cannot be read."""
    try:
        with os.scandir(path) as entries:
            return [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _chunks(rank: str) -> Iterator[tuple[int, int, str]]:
    """(time of the last change in ns, size, path) of every file that a rank has written, those of dead writers among them."""
    for folder in _folders(rank):
        try:
            with os.scandir(folder.path) as entries:
                for entry in entries:
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if stat.S_ISREG(status.st_mode):
                        yield status.st_mtime_ns, status.st_size, entry.path
        except OSError:
            continue


def _remove_if_empty(path: str) -> None:
    for folder in _folders(path):
        _remove_if_empty(folder.path)
    with suppress(OSError):
        Path(path).rmdir()
