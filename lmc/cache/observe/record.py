"""The lookup trace: one JSON line for each request that was admitted. `lmc sim` reads it.

The first line is a header with TRACE_FORMAT, TRACE_VERSION and the sizes of a chunk. A line holds the time in seconds since the start, the
request, its prompt tokens, the first NAME_BYTES of each full chunk's key in hex, the hit tokens by tier, and a name for the tenant. No
text, no token ids and no salts are written: a tenant's name is a hash with a secret that is made for the file and forgotten with it.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import BufferedWriter
from pathlib import Path

import orjson
from blake3 import blake3

from lmc.cache.keys import ChunkKey
from lmc.errors import ConfigError

logger = logging.getLogger(__name__)

TRACE_FORMAT = "lmc-trace"
TRACE_VERSION = 1
NAME_BYTES = 8
_FLUSH_SECONDS = 1.0


class TraceRecorder:
    def __init__(self, path: Path, *, chunk_tokens: int, chunk_bytes: int, namespace: str, now: float) -> None:
        """Replace the file. Raises ConfigError when it cannot be written."""
        self._path = path
        self._file: BufferedWriter | None
        try:
            self._file = os.fdopen(_open_for_the_owner(path), "wb")
        except OSError as error:
            raise ConfigError(f"cannot write the trace {path}: {error.strerror}") from error
        self._secret = secrets.token_bytes(32)
        self._start = now
        self._flushed = now
        header = {
            "format": TRACE_FORMAT,
            "version": TRACE_VERSION,
            "chunk_tokens": chunk_tokens,
            "chunk_bytes": chunk_bytes,
            "namespace": namespace,
            "started": time.time(),
        }
        self._write(header, flush=True)

    def lookup(
        self,
        now: float,
        request_id: str,
        num_tokens: int,
        keys: Sequence[ChunkKey],
        tenant: str,
        hit_tokens: Mapping[str, int],
    ) -> None:
        line = {
            "t": round(now - self._start, 6),
            "request": request_id,
            "tokens": num_tokens,
            "chunks": [key[:NAME_BYTES].hex() for key in keys],
            "tenant": self._name(tenant),
            "hit_tokens": dict(hit_tokens),
        }
        flush = now - self._flushed >= _FLUSH_SECONDS
        self._write(line, flush=flush)
        if flush:
            self._flushed = now

    def _write(self, line: Mapping[str, object], *, flush: bool) -> None:
        """A disk that is full ends the trace, which is whole up to then but for its last line."""
        if self._file is None:
            return
        try:
            self._file.write(orjson.dumps(line) + b"\n")
            if flush:
                self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        logger.error("lmc: the trace %s ends here: %s", self._path, error.strerror)
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # it would write what it holds once more
                file.close()

    def _name(self, tenant: str) -> str:
        """The same for the same tenant and salt, in this file only; empty for none."""
        whole = tenant.encode(errors="surrogatepass")
        return blake3(whole, key=self._secret).hexdigest(NAME_BYTES) if whole else ""

    def close(self) -> None:
        if self._file is None:
            return
        try:
            self._file.close()
        except OSError as error:
            self._give_up(error)


def _open_for_the_owner(path: Path) -> int:
    """What requests have in common tells much about them, so others shall not read it."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with suppress(PermissionError):  # a file or pipe that somebody else made for us
        os.fchmod(fd, 0o600)
    return fd
