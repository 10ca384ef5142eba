"""The disk tier: one file per chunk, shared by any number of processes.

    PATH/v3/<namespace>/r<rank>/<first byte of the key>/<key>     the payload, then the footer
    PATH/v3/<namespace>/r<rank>/tmp/                              chunks being written

A put writes a temporary file, syncs it and renames it, so a name always stands for a whole chunk (without fsync, after a power cut, for
one that does not match its checksum). The writer holds a lock (flock) on its temporary file: one that can be locked has no writer any more,
and scan removes it. Bytes are read in file_read.py and written in file_write.py. All calls release the GIL while they wait for the disk.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lmc.cache.keys import KEY_BYTES, ChunkKey
from lmc.cache.tiers.file_read import read_chunk, read_footer, read_loop
from lmc.cache.tiers.file_write import write_chunk
from lmc.cache.tiers.format import FORMAT, TierScope, checksum, decode, stored_bytes
from lmc.errors import Corrupt, TierError, TierFull

_log = logging.getLogger(__name__)

_PARENTS_SECONDS = 5.0  # an engine waits for it at its start
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FILE_NAME = re.compile(rf"[0-9a-f]{{{2 * KEY_BYTES}}}")


class DiskTier:
    """Chunks under path. Raises TierError when the folder cannot be created or written.

    A put that finds no room raises TierFull and leaves nothing behind; how much may be stored is for the directory to decide.
    """

    name = "disk"

    def __init__(self, path: Path, scope: TierScope, *, fsync: bool = True) -> None:
        self._scope = scope
        self._fsync = fsync
        self._folder = path / FORMAT / scope.namespace / f"r{scope.rank}"
        self._folder_name = str(self._folder)
        self._temporary = self._folder / "tmp"
        self._process = secrets.token_hex(8)
        self._serial = itertools.count()
        read_loop()  # takes a second when it was never compiled: better now than in the first load
        try:
            self._temporary.mkdir(parents=True, exist_ok=True)
            fd, probe = self._create()
            probe.unlink()  # while it is locked, or the scan of another process may do it
            os.close(fd)
        except OSError as error:
            raise TierError(f"disk tier: cannot write in {self._folder}: {error.strerror}") from error
        for other in sorted(path.glob("v[0-9]*")):
            if other.name != FORMAT:
                _log.warning(
                    "lmc: disk tier: another version of lmc has stored chunks in %s; delete it if none runs", other
                )

    def put(self, key: ChunkKey, data: memoryview, parent: ChunkKey | None = None) -> None:
        target = self._file(key)
        self._scope.check_size(data)
        footer = self._scope.seal(key, checksum(data), parent)
        try:
            self._write(target, data, footer)
        except OSError as error:
            kind = TierFull if error.errno in _NO_ROOM else TierError
            raise kind(f"disk tier: cannot store {target}: {error.strerror}") from error

    def get(self, key: ChunkKey, out: memoryview) -> None:
        source = self._file_name(key)
        try:
            footer, found = read_chunk(source, out)
            self._scope.verify(key, footer, found)
        except FileNotFoundError:
            raise KeyError(key) from None
        except Corrupt as error:
            raise Corrupt(f"disk tier: {source}: {error}") from None
        except OSError as error:
            raise TierError(f"disk tier: cannot load {source}: {error.strerror}") from error

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        try:
            return [self._file(key).exists() for key in keys]
        except OSError as error:
            raise TierError(f"disk tier: cannot look into {self._folder}: {error.strerror}") from error

    def delete(self, key: ChunkKey) -> None:
        target = self._file(key)
        try:
            target.unlink(missing_ok=True)
        except OSError as error:
            raise TierError(f"disk tier: cannot delete {target}: {error.strerror}") from error

    def scan(self) -> Iterator[tuple[ChunkKey, int]]:
        """Oldest first. Removes what dead writers have left; files of another name or size are not chunks and not reported."""
        try:
            self._remove_leftovers()
            found = sorted(self._files())
        except OSError as error:
            raise TierError(f"disk tier: cannot read {self._folder}: {error.strerror}") from error
        for _, name in found:
            yield ChunkKey(bytes.fromhex(name)), self._scope.chunk_bytes

    def parents(self, keys: Sequence[ChunkKey], seconds: float = _PARENTS_SECONDS) -> dict[ChunkKey, ChunkKey]:
        """The chunk before each of keys, where there is one, as their footers say.

        keys are oldest first; when not all footers can be read in time, those of the oldest are left out.
        """
        until = time.monotonic() + seconds
        found = {}
        for number, key in enumerate(reversed(keys)):
            if time.monotonic() > until:
                text = "lmc: disk tier: read %d of %d footers in %s within %g s; of the other chunks no parent is known"
                _log.warning(text, number, len(keys), self._folder, seconds)
                break
            try:
                footer = decode(read_footer(self._file_name(key), self._scope.chunk_bytes))
            except (OSError, Corrupt):
                continue  # a load will say what is wrong with it
            if footer.key == key and footer.parent is not None:
                found[key] = footer.parent
        return found

    def close(self) -> None:
        """Nothing is held between calls."""

    def _file(self, key: ChunkKey) -> Path:
        return Path(self._file_name(key))

    def _file_name(self, key: ChunkKey) -> str:
        name = key.hex()
        return f"{self._folder_name}/{name[:2]}/{name}"  # a Path would take 20 us to build

    def _create(self) -> tuple[int, Path]:
        """A new temporary file, locked by this process."""
        while True:
            path = self._temporary / f"{self._process}-{next(self._serial)}"
            try:
                fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                self._temporary.mkdir(parents=True, exist_ok=True)  # somebody emptied the folder
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                if os.fstat(fd).st_nlink:
                    return fd, path
            except OSError:
                path.unlink(missing_ok=True)
                os.close(fd)
                raise
            os.close(fd)  # a scan came between open and lock

    def _write(self, target: Path, data: memoryview, footer: bytes) -> None:
        fd, temporary = self._create()
        try:
            write_chunk(fd, data, footer)
            if self._fsync:
                os.fsync(fd)
            if not target.parent.is_dir():
                target.parent.mkdir(exist_ok=True)
                self._sync_folder(self._folder)
            temporary.rename(target)
        finally:
            os.close(fd)
            temporary.unlink(missing_ok=True)  # renamed if all went well
        try:
            self._sync_folder(target.parent)
        except OSError:
            target.unlink(missing_ok=True)  # a put that fails stores nothing
            raise

    def _sync_folder(self, path: Path) -> None:
        if not self._fsync:
            return
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _files(self) -> Iterator[tuple[int, str]]:
        """(time of the last change in ns, name) of each file that has a chunk's name and size."""
        for folder in self._folder.iterdir():
            if folder == self._temporary or not folder.is_dir():
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not _FILE_NAME.fullmatch(entry.name):
                        continue
                    try:
                        status = entry.stat()
                    except FileNotFoundError:
                        continue  # another process evicted it
                    if status.st_size == stored_bytes(self._scope.chunk_bytes):
                        yield status.st_mtime_ns, entry.name

    def _remove_leftovers(self) -> None:
        for path in self._temporary.iterdir():
            try:
                fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            except (FileNotFoundError, PermissionError):
                continue  # renamed meanwhile, or another user's
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink(missing_ok=True)
            except BlockingIOError:
                pass  # its writer is alive
            finally:
                os.close(fd)
