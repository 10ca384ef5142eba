"""The disk tier: one file per chunk, shared by any number of processes.

    PATH/v4/<namespace>/r<rank>/<first byte of the key>/<key>     the payload, then the footer
    PATH/v4/<namespace>/r<rank>/tmp/                              chunks being written
    PATH/v4/<namespace>/lease                                     locked while the namespace is in use

A put writes a temporary file, syncs it and renames it, so a name always stands for a whole chunk (without fsync, after a power cut, for
one that does not match its checksum). The writer holds a lock (flock) on its temporary file: one that can be locked has no writer any more,
and scan removes it. Bytes are read in file_read.py and written in file_write.py; files.py opens, places and removes entries whatever others
have put there, and namespaces.py shares the folder's capacity out. All calls release the GIL while they wait for the disk.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from lmc.cache.keys import KEY_BYTES, ChunkKey
from lmc.cache.tiers.file_read import read_chunk, read_footer, read_loop
from lmc.cache.tiers.file_write import write_chunk
from lmc.cache.tiers.files import FILE_MODE, is_file, make_folders, move_over, remove, replace_by_folder
from lmc.cache.tiers.format import FOOTER_BYTES, FORMAT, TierScope, decode, stored_bytes
from lmc.cache.tiers.namespaces import TEMPORARY, FolderShare, take_lease
from lmc.cache.tiers.stored import Moved, pack, unpack
from lmc.errors import Corrupt, TierError, TierFull

_log = logging.getLogger(__name__)

_PARENTS_SECONDS = 5.0  # an engine waits for it at its start
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FILE_NAME = re.compile(rf"[0-9a-f]{{{2 * KEY_BYTES}}}")


class DiskTier:
    """Chunks under path. Raises TierError when the folder cannot be created or written.

    A put that finds no room raises TierFull and leaves nothing behind; which chunks go is for the directory to decide. capacity: bytes that
    all namespaces under path may take over num_ranks ranks; chunks of namespaces that nobody uses make room.
    """

    name = "disk"

    def __init__(
        self, path: Path, scope: TierScope, *, fsync: bool = True, capacity: int | None = None, num_ranks: int = 1
    ) -> None:
        self._scope = scope
        self._fsync = fsync
        self._path = str(path)
        self._namespace_folder = str(path / FORMAT / scope.namespace)
        self._folder = f"{self._namespace_folder}/r{scope.rank}"
        self._temporary = f"{self._folder}/{TEMPORARY}"
        self._share = None if capacity is None else FolderShare(path, scope.namespace, scope.rank, num_ranks, capacity)
        self.progress = 0  # entries looked at
        self.is_open = True
        self._lease = -1
        self._process = secrets.token_hex(8)
        self._serial = itertools.count()
        read_loop()  # takes a second when it was never compiled: better now than in the first load
        try:
            self._make_folders()
            fd, probe = self._create()
            Path(probe).unlink()  # while it is locked, or the scan of another process may do it
            os.close(fd)
        except OSError as error:
            raise TierError(f"disk tier: cannot write in {self._folder}: {error.strerror}") from error
        for other in sorted(path.glob("v[0-9]*")):
            if other.name != FORMAT:
                _log.warning(
                    "lmc: disk tier: another version of lmc has stored chunks in %s; delete it if none runs", other
                )

    def put(self, key: ChunkKey, data: memoryview, parent: ChunkKey | None = None) -> Moved:
        self._scope.check_size(data)
        payload, coding, seconds = pack(self._scope, data)
        footer = self._scope.seal(key, self._scope.checksum(payload), parent, len(payload), coding)
        size = stored_bytes(len(payload))
        kept = False
        try:
            if self._share is not None:
                self._share.begin(key.hex(), size)
            try:
                self._write(key, payload, footer)
                kept = True
            finally:
                if self._share is not None:
                    self._share.end(key.hex(), size, kept=kept)
        except (Corrupt, TierFull) as error:
            raise type(error)(f"disk tier: cannot store {self._file_name(key)}: {error}") from None
        except OSError as error:
            kind = TierFull if error.errno in _NO_ROOM else TierError
            raise kind(f"disk tier: cannot store {self._file_name(key)}: {error.strerror}") from error
        return Moved(size, seconds)

    def get(self, key: ChunkKey, out: memoryview) -> Moved:
        """A file that this user may not read counts as absent: it is another user's, and no harm is done to it."""
        folder, name = self._place(key)
        try:
            payload, footer, found = read_chunk(folder, name, out, self._scope)
            return unpack(self._scope, key, payload, footer, found, out)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            raise KeyError(key) from None
        except Corrupt as error:
            raise type(error)(f"disk tier: {folder}/{name}: {error}") from None
        except OSError as error:
            raise TierError(f"disk tier: cannot load {folder}/{name}: {error.strerror}") from error

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        try:
            return [is_file(*self._place(key)) for key in keys]
        except OSError as error:
            raise TierError(f"disk tier: cannot look into {self._folder}: {error.strerror}") from error

    def delete(self, key: ChunkKey) -> None:
        folder, name = self._place(key)
        try:
            freed = remove(folder, name)
        except Corrupt as error:
            raise Corrupt(f"disk tier: cannot delete {folder}/{name}: {error}") from None
        except OSError as error:
            raise TierError(f"disk tier: cannot delete {folder}/{name}: {error.strerror}") from error
        if self._share is not None:
            self._share.give(freed)

    def scan(self) -> Iterator[tuple[ChunkKey, int]]:
        """Oldest first. Removes what dead writers have left; what has another name or size or is no file is not a chunk and not reported.

        What cannot be looked at is left out.
        """
        try:
            self._remove_leftovers()
            found = sorted(self._files())
        except OSError as error:
            raise TierError(f"disk tier: cannot read {self._folder}: {error.strerror}") from error
        for _, name, size in found:
            yield ChunkKey(bytes.fromhex(name)), size

    def parents(self, keys: Sequence[ChunkKey], seconds: float = _PARENTS_SECONDS) -> dict[ChunkKey, ChunkKey]:
        """The chunk before each of keys, as their footers state it.

        keys are oldest first. If not all footers can be read in time, those of the oldest chunks are left out.
        """
        until = time.monotonic() + seconds
        found = {}
        for number, key in enumerate(reversed(keys)):
            self.progress += 1
            if time.monotonic() > until:
                text = "lmc: disk tier: read %d of %d footers in %s within %g s; of the other chunks no parent is known"
                _log.warning(text, number, len(keys), self._folder, seconds)
                break
            try:
                footer = decode(read_footer(*self._place(key)))
            except (OSError, Corrupt):
                continue  # a load will say what is wrong with it
            if footer.key == key and footer.parent is not None:
                found[key] = footer.parent
        return found

    def close(self) -> None:
        """Let the namespace go: from now on its chunks may make room for others."""
        lease, self._lease = self._lease, -1
        if lease >= 0:
            with suppress(OSError):
                os.utime(lease)
            os.close(lease)

    def _place(self, key: ChunkKey) -> tuple[str, str]:
        """Folder and name of the key's file; a Path would take 20 us to build."""
        name = key.hex()
        return f"{self._folder}/{name[:2]}", name

    def _file_name(self, key: ChunkKey) -> str:
        return "/".join(self._place(key))

    def _make_folders(self) -> None:
        """Also when somebody has removed them."""
        make_folders(self._path, FORMAT, self._scope.namespace, f"r{self._scope.rank}")
        replace_by_folder(self._temporary)
        lease, self._lease = self._lease, take_lease(self._namespace_folder)
        if lease >= 0:
            os.close(lease)

    def _create(self) -> tuple[int, str]:
        """A new temporary file, locked by this process."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        while True:
            path = f"{self._temporary}/{self._process}-{next(self._serial)}"
            try:
                fd = os.open(path, flags, FILE_MODE)
            except (FileNotFoundError, NotADirectoryError):
                self._make_folders()  # somebody emptied the folder
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                if os.fstat(fd).st_nlink:
                    return fd, path
            except OSError:
                Path(path).unlink(missing_ok=True)
                os.close(fd)
                raise
            os.close(fd)  # a scan came between open and lock

    def _write(self, key: ChunkKey, data: memoryview, footer: bytes) -> None:
        folder, name = self._place(key)
        fd, temporary = self._create()
        try:
            write_chunk(fd, data, footer)
            if self._fsync:
                os.fsync(fd)
            if replace_by_folder(folder):
                self._sync_folder(self._folder)
            move_over(temporary, folder, name)
        finally:
            os.close(fd)
            Path(temporary).unlink(missing_ok=True)  # renamed if all went well
        try:
            self._sync_folder(folder)
        except OSError:
            remove(folder, name)  # a put that fails stores nothing
            raise

    def _sync_folder(self, path: str) -> None:
        if not self._fsync:
            return
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _files(self) -> Iterator[tuple[int, str, int]]:
        """(time of the last change in ns, name, bytes) of each file that has a chunk's name and a size that one may have."""
        left_out: list[OSError] = []
        with os.scandir(self._folder) as folders:
            for folder in folders:
                if folder.name == TEMPORARY or not folder.is_dir(follow_symlinks=False):
                    continue
                try:
                    with os.scandir(folder.path) as entries:
                        yield from self._chunks_among(entries, left_out)
                except OSError as error:
                    left_out.append(error)
        if left_out:
            text = "lmc: disk tier: %d entries of %s cannot be looked at and are left out; the first: %s"
            _log.warning(text, len(left_out), self._folder, left_out[0])

    def _chunks_among(
        self, entries: Iterator[os.DirEntry[str]], left_out: list[OSError]
    ) -> Iterator[tuple[int, str, int]]:
        for entry in entries:
            self.progress += 1
            if not _FILE_NAME.fullmatch(entry.name):
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # another process evicted it
            except OSError as error:
                left_out.append(error)
                continue
            if stat.S_ISREG(status.st_mode) and FOOTER_BYTES < status.st_size <= stored_bytes(self._scope.chunk_bytes):
                yield status.st_mtime_ns, entry.name, status.st_size

    def _remove_leftovers(self) -> None:
        """What cannot be opened, locked or removed stays: it is no temporary file of lmc's, another user's, or its writer is alive."""
        with os.scandir(self._temporary) as entries:
            leftovers = [entry.path for entry in entries if entry.is_file(follow_symlinks=False)]
        for path in leftovers:
            with suppress(OSError):
                fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    Path(path).unlink()
                finally:
                    os.close(fd)
