"""The lookup trace: one JSON line for each request that was admitted. `lmc sim` reads it.

The first line is a header with TRACE_FORMAT, TRACE_VERSION and the sizes of a chunk. A line holds the time in seconds since the start, the
request, its prompt tokens, the first NAME_BYTES of each full chunk's key in hex, and the hit tokens by tier. No text and no token ids are
written.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import orjson

from lmc.cache.keys import ChunkKey
from lmc.errors import ConfigError

TRACE_FORMAT = "lmc-trace"
TRACE_VERSION = 1
NAME_BYTES = 8
_FLUSH_SECONDS = 1.0


class TraceRecorder:
    def __init__(self, path: Path, *, chunk_tokens: int, chunk_bytes: int, namespace: str, now: float) -> None:
        """Replaces the file. Raises ConfigError when it cannot be written."""
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise ConfigError(f"cannot write the trace {path}: {error.strerror}") from error
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
        self._file.write(orjson.dumps(header) + b"\n")

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
            "tenant": tenant,
            "hit_tokens": dict(hit_tokens),
        }
        self._file.write(orjson.dumps(line) + b"\n")
        if now - self._flushed >= _FLUSH_SECONDS:
            self._file.flush()
            self._flushed = now

    def close(self) -> None:
        self._file.close()
