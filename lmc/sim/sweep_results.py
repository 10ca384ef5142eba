"""The results of a sweep in a Parquet file, with a journal beside it while the sweep runs, so that a killed sweep goes on.

The journal (FILE.partial) has one JSON line for each finished job. A line is in the kernel's hands when add() returns. finish() writes the
Parquet file at once and removes the journal. The Parquet file is a source of finished jobs, too, so a sweep can be widened.
"""

from __future__ import annotations

import fcntl
import io
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from lmc.errors import ConfigError
from lmc.report import write_file
from lmc.sim.sweep_jobs import Row

COLUMNS = pa.schema(
    [
        ("trace", pa.string()),
        ("format", pa.string()),
        ("requests", pa.int64()),
        ("window", pa.string()),
        ("chunk_tokens", pa.int64()),
        ("policy", pa.string()),
        ("capacity", pa.string()),  # as it was given
        ("capacity_blocks", pa.float64()),  # of chunk_tokens each; infinity: no eviction
        ("capacity_tokens", pa.float64()),
        ("hit_blocks", pa.int64()),
        ("total_blocks", pa.int64()),
        ("hit_tokens", pa.int64()),
        ("total_tokens", pa.int64()),
        ("block_hit_rate", pa.float64()),
        ("token_hit_rate", pa.float64()),
        ("hit_bytes", pa.int64()),  # missing if the bytes of a token are not known
        ("job", pa.string()),
    ]
)


class Results:
    """The rows of a sweep by the key of their job."""

    def __init__(self, path: Path, wanted: Sequence[str]) -> None:
        """Read what is there of the wanted jobs. Raises ConfigError if the file has other results, or another sweep writes it."""
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self.rows: dict[str, Row] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(f"cannot write {self._partial}: {error.strerror}; choose another place") from None
        try:
            self._lock()
            self._read(set(wanted))
        except ConfigError:
            self._close()
            raise

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def add(self, row: Row) -> None:
        self.rows[row["job"]] = row
        line = orjson.dumps({**row, "capacity_blocks": str(row["capacity_blocks"])}) + b"\n"
        while line:
            line = line[os.write(self._fd, line) :]

    def finish(self, keys: Sequence[str]) -> None:
        """Write the rows of these jobs, in this order, to the Parquet file. Raises ConfigError."""
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([self.rows[key] for key in keys], COLUMNS), buffer)
        write_file(self._path, buffer.getvalue())
        os.truncate(self._fd, 0)

    def _close(self) -> None:
        if os.fstat(self._fd).st_size == 0:
            self._partial.unlink(missing_ok=True)
        os.close(self._fd)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another sweep writes {self._path}; wait for it, or give another file") from None

    def _read(self, wanted: set[str]) -> None:
        found = [*_read_parquet(self._path), *_read_journal(self._partial)]
        foreign = [row for row in found if row["job"] not in wanted]
        if foreign:
            one = foreign[0]
            raise ConfigError(
                f"{self._path} has {len(foreign)} results that this sweep does not ask for, such as {one['policy']} at {one['capacity']} "
                f"on {one['trace']} (or the trace, the policy or lmc has changed since); give another file, or remove this one and "
                f"{self._partial.name}"
            )
        self.rows = {row["job"]: row for row in found}


def _read_parquet(path: Path) -> list[Row]:
    if not path.exists():
        return []
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"{path} is there and cannot be read as Parquet ({error}); give another file") from None
    if not table.schema.equals(COLUMNS):
        raise ConfigError(f"{path} is there and is not the result of a sweep; give another file")
    rows: list[Row] = table.to_pylist()
    return rows


def _read_journal(path: Path) -> list[Row]:
    """The rows of all whole lines. What follows the last one, as a power failure may leave it, is cut off."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(path, len(whole))
    try:
        rows: list[Row] = [orjson.loads(line) for line in whole.splitlines()]
    except orjson.JSONDecodeError as error:
        raise ConfigError(f"{path} is damaged ({error}); remove it") from None
    for row in rows:
        row["capacity_blocks"] = float(row["capacity_blocks"])
        row["capacity_tokens"] = row["capacity_blocks"] * row["chunk_tokens"]
    return rows
