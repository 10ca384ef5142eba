"""The lookup trace: one JSON line for each request that was admitted. `lmc sim` reads it.

The first line is a header with TRACE_FORMAT, TRACE_VERSION, the sizes of a chunk, the shape of a model with several KV groups and the time
of day at which the file began. A line holds the seconds since then, the request, its prompt tokens, the first NAME_BYTES of each full
chunk's key in hex, the hit tokens by tier, a name for the tenant, and if the client says them the request's class, a word, and a name for
its session. No text, no token ids and no salts are written: the names of tenants and sessions are hashes with a secret that is made for the
process and forgotten with it.

A line is in the kernel's hands when lookup() returns, so no end of the process loses it. A process that starts again goes on with the file.
A file that is full, or whose chunks are other ones, is renamed to PATH.1, PATH.2 and so on, and PATH begins anew. Nothing is deleted.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import orjson
from blake3 import blake3

from lmc.cache.directory import NOTHING_TOLD, Told
from lmc.cache.keys import ChunkKey
from lmc.cache.observe.logs import Sparingly
from lmc.errors import ConfigError

TRACE_FORMAT = "lmc-trace"
TRACE_VERSION = 1
NAME_BYTES = 8
SAME_CHUNKS = (
    "version",
    "chunk_tokens",
    "chunk_bytes",
    "namespace",
)  # fields of a header that are equal in files that go on
_LONGEST_HEADER = 1 << 16

logger = logging.getLogger(__name__)


class TraceRecorder:
    def __init__(
        self,
        path: Path,
        *,
        limit: int,
        chunk_tokens: int,
        chunk_bytes: int,
        namespace: str,
        now: float,
        shape: Mapping[str, Any] | None = None,
    ) -> None:
        """Go on with the file, or begin it. limit: bytes of one file. shape: of a model with several KV groups, as JSON.

        Raises ConfigError when it cannot be written or is another file.
        """
        self._path = path
        self._limit = limit
        self._secret = secrets.token_bytes(32)
        self._sparingly = Sparingly()
        self._fd = -1
        self._header = {
            "format": TRACE_FORMAT,
            "version": TRACE_VERSION,
            "chunk_tokens": chunk_tokens,
            "chunk_bytes": chunk_bytes,
            "namespace": namespace,
            **({"shape": shape} if shape is not None else {}),
        }
        try:
            self._open(now)
        except OSError as error:
            raise ConfigError(f"cannot write the trace {path}: {error.strerror}") from error

    def lookup(
        self,
        now: float,
        request_id: str,
        num_tokens: int,
        keys: Sequence[ChunkKey],
        tenant: str,
        hit_tokens: Mapping[str, int],
        told: Told = NOTHING_TOLD,
    ) -> None:
        """Write a line. If that fails, the line is lost, and a warning says so."""
        line: dict[str, Any] = {  # Any: JSON
            "t": round(now - self._start, 6),
            "request": request_id,
            "tokens": num_tokens,
            "chunks": [key[:NAME_BYTES].hex() for key in keys],
            "tenant": self._name(tenant),
            "hit_tokens": dict(hit_tokens),
        }
        if told.class_name:
            line["class"] = told.class_name
        if told.session:
            line["session"] = self._name(told.session)
        try:
            size = _write_whole(self._fd, orjson.dumps(line) + b"\n")
            if self._rotates and size >= self._limit:
                self._begin_another(now)
        except (OSError, ConfigError) as error:
            self._sparingly.warn(logger, "record", f"lookups are missing in the trace {self._path}: {error}")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self, now: float) -> None:
        """Go on with the file if its chunks are the same, else begin another one. Raises OSError, and ConfigError for a foreign file."""
        with ExitStack() as opened:
            fd = _open_for_the_owner(self._path)
            opened.callback(os.close, fd)
            status = os.fstat(fd)
            clock = time.time()
            rotates = stat.S_ISREG(status.st_mode)  # and is not a pipe or a terminal
            if not rotates or status.st_size == 0:
                start = now
                _write_whole(fd, orjson.dumps({**self._header, "started": clock}) + b"\n")
            else:
                header = _read_header(self._path)
                started = header.get("started")
                same = all(header.get(name) == self._header[name] for name in SAME_CHUNKS)
                if not same or not isinstance(started, int | float) or started > clock or status.st_size >= self._limit:
                    _rename_full(self._path, fd)
                    self._open(now)
                    return
                start = now - (clock - started)
                _drop_half_line(fd, self._path)
            opened.pop_all()
        self._fd, self._start, self._rotates = fd, start, rotates

    def _begin_another(self, now: float) -> None:
        """Raises OSError; then this process goes on with the file that it has."""
        full = self._fd
        _rename_full(self._path, full)
        self._open(now)
        os.close(full)

    def _name(self, tenant: str) -> str:
        """The same for the same tenant and salt, in this process only; empty for none."""
        whole = tenant.encode(errors="surrogatepass")
        return blake3(whole, key=self._secret).hexdigest(NAME_BYTES) if whole else ""


def _write_whole(fd: int, line: bytes) -> int:
    """Write all of the line, or nothing. Returns the size of the file. Raises OSError."""
    size = os.fstat(fd).st_size
    written = 0
    try:
        while written < len(line):
            written += os.write(fd, line[written:])
    except OSError:
        if written:
            with suppress(OSError):  # of a pipe
                os.ftruncate(fd, size)
        raise
    return size + written


def _rename_full(path: Path, fd: int) -> None:
    """Rename the open file to the next free number, unless another process did so before."""
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(fd), path.stat()):
            path.rename(next_rotated(path))


def rotated(path: Path) -> list[Path]:
    """The files that were full, oldest first: PATH.1, PATH.2 and so on."""
    found = []
    for file in path.parent.glob(f"{_escaped(path.name)}.*"):
        number = file.name.removeprefix(f"{path.name}.")
        if number.isascii() and number.isdigit():
            found.append((int(number), file))
    return [file for _, file in sorted(found)]


def next_rotated(path: Path) -> Path:
    before = rotated(path)
    last = int(before[-1].name.rpartition(".")[2]) if before else 0
    return path.with_name(f"{path.name}.{last + 1}")


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _open_for_the_owner(path: Path) -> int:
    """What requests have in common tells much about them, so others shall not read it."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with suppress(PermissionError):  # a file or pipe that somebody else made for us
        os.fchmod(fd, 0o600)
    return fd


def _read_header(path: Path) -> dict[str, Any]:  # Any: JSON
    """Raises ConfigError if the file is not a record of lmc."""
    with path.open("rb") as file:
        line = file.readline(_LONGEST_HEADER)
    try:
        header = orjson.loads(line)
    except orjson.JSONDecodeError:
        header = None
    if not isinstance(header, dict) or header.get("format") != TRACE_FORMAT:
        raise ConfigError(
            f"{path} is there and is not a record of lmc, so it is left alone; give another file for the record"
        )
    return header


def _drop_half_line(fd: int, path: Path) -> None:
    """Cut what follows the last whole line, as a power failure may leave it."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _LONGEST_HEADER)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < file.seek(0, os.SEEK_END):
            os.ftruncate(fd, end)
