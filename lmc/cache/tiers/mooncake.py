"""The Mooncake tier: one object per chunk, payload and footer, in the memory that several machines pool in a Mooncake Store.

The client library runs in a process of its own (mooncake_process), which maps the host slots. So a chunk goes from a slot to the machine
that keeps it, and back, without a copy on this one. The store evicts on its own, and what a machine kept is gone with it: those are misses.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lmc.cache.keys import ChunkKey
from lmc.cache.sections import MooncakeConfig
from lmc.cache.tiers.format import FOOTER_BYTES, FORMAT, TierScope, stored_bytes
from lmc.cache.tiers.lent import LentMemory
from lmc.cache.tiers.mooncake_client import OTHER_SIZE, SCRATCH
from lmc.cache.tiers.mooncake_process import ClientFailed, Line, Region, release_client, shared_client
from lmc.cache.tiers.stored import Moved, pack, unpack
from lmc.errors import ConfigError, Corrupt, TierError, TierFull
from lmc.memory import available_memory
from lmc.units import format_size

Place = Callable[[memoryview], Region | None]

_RDMA_DEVICES = Path("/sys/class/infiniband")
_TRIES = 3  # a chunk that is replaced or deleted while it is read looks corrupt

_FULL = -200
_NOT_READY = -703  # somebody stores it just now
_ABSENT = -704
_GONE = -712
_TRANSFER = -800
_NOT_THERE = (_ABSENT, _NOT_READY, _GONE)
_MEANINGS = {
    _FULL: "no machine has room for it",
    _NOT_READY: "another client stores it just now",
    _TRANSFER: "the machine that keeps it cannot be reached",
    -707: "the transfer took longer than the store lends an object",
    -900: "the master cannot be reached",
    -901: "the master does not answer in time",
}


class MooncakeTier:
    """Raises ConfigError for an address that cannot be right, and TierError for what this machine lacks or what goes wrong later."""

    name = "mooncake"

    def __init__(self, config: MooncakeConfig, scope: TierScope, *, contributes: bool = True) -> None:
        """contributes: this tier brings mooncake.segment into the store; one that only asks does not."""
        if config.master is None:
            raise ConfigError("mooncake.master is not set")
        check_master(config.master)
        segment = config.segment if contributes and config.segment is not None else 0
        check_machine(config, segment)
        self._scope = scope
        self._prefix = f"lmc/{FORMAT}/{scope.namespace}/{scope.rank}/"
        self._where = f"mooncake tier at {config.master}"
        self._client = shared_client(config, segment)
        self._closed = False

    def lend(self, memory: LentMemory) -> None:
        self._client.lend(memory)

    def put(self, key: ChunkKey, data: memoryview, parent: ChunkKey | None = None) -> Moved:
        """Leaves a chunk of the same content as it is, and one that another client stores just now."""
        self._scope.check_size(data)
        name = self._name(key)
        with self._line("store", key) as (line, place):
            line.ask("size", name)
            payload, coding, seconds = pack(self._scope, data)
            checksum = self._scope.checksum(payload)
            footer = self._scope.seal(key, checksum, parent, len(payload), coding)
            stored = line.answer()
            if stored == _NOT_READY:
                return Moved(stored_bytes(len(payload)), seconds)
            _require(stored, _ABSENT)
            if stored >= 0:
                if self._is_same(line, key, stored, checksum, len(payload), data):
                    return Moved(stored, seconds)
                _require(line.call("remove", name), _ABSENT)
            source = place(payload)
            if source is None:
                line.scratch[: len(payload)] = payload
                source = Region(SCRATCH, 0, len(payload))
            line.scratch[self._scope.chunk_bytes :] = footer
            _require(line.call("put", name, [source, self._footer_region]))
        return Moved(stored_bytes(len(payload)), seconds)

    def get(self, key: ChunkKey, out: memoryview) -> Moved:
        for left in reversed(range(_TRIES)):
            try:
                return self._get(key, out)
            except Corrupt:
                if not left:
                    raise
        raise AssertionError("unreachable")

    def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        if not keys:
            return []
        with self._line("look up", keys[0]) as (line, _):
            answers = line.exist([self._name(key) for key in keys])
            for answer in answers:
                _require(answer)
        return [answer == 1 for answer in answers]

    def delete(self, key: ChunkKey) -> None:
        with self._line("delete", key) as (line, _):
            _require(line.call("remove", self._name(key)), _ABSENT)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            release_client(self._client)

    @property
    def _footer_region(self) -> Region:
        return Region(SCRATCH, self._scope.chunk_bytes, FOOTER_BYTES)

    def _get(self, key: ChunkKey, out: memoryview) -> Moved:
        name = self._name(key)
        with self._line("load", key) as (line, place):
            if self._scope.compress == "none":
                slot = place(out)
                parts = [slot or Region(SCRATCH, 0, len(out)), self._footer_region]
                code = line.call("get", name, parts)
                if code == stored_bytes(len(out)):
                    if slot is None:
                        out[:] = line.scratch[: len(out)]
                    return self._verified(line, key, out)
                if code != OTHER_SIZE:
                    _require_loaded(key, code)
            size = line.call("get_up_to", name, [Region(SCRATCH, 0, len(line.scratch))])
            if size == OTHER_SIZE:
                raise Corrupt(f"it has more than the {stored_bytes(len(out))} bytes of such a chunk")
            _require_loaded(key, size)
            if size <= FOOTER_BYTES:
                raise Corrupt(f"it has {size} bytes, too few for a chunk")
            payload = line.scratch[: size - FOOTER_BYTES]
            if len(payload) == len(out):
                out[:] = payload
                payload = out
            return self._unpack(key, payload, line.scratch[size - FOOTER_BYTES : size], out)

    def _verified(self, line: Line, key: ChunkKey, out: memoryview) -> Moved:
        """Of a chunk that lies in out, with what was behind it in the line's memory."""
        try:
            return self._unpack(key, out, line.scratch[self._scope.chunk_bytes :], out)
        except Corrupt:
            size = line.call("size", self._name(key))
            if size > 0 and size != stored_bytes(len(out)):
                raise Corrupt(f"it has {size} bytes instead of {stored_bytes(len(out))}") from None
            raise

    def _unpack(self, key: ChunkKey, payload: memoryview, footer: memoryview, out: memoryview) -> Moved:
        return unpack(self._scope, key, payload, footer, self._scope.checksum(payload), out)

    def _is_same(self, line: Line, key: ChunkKey, stored: int, checksum: int, length: int, data: memoryview) -> bool:
        """Whether what is stored under the key is this chunk by its footer, as it would be stored now or as it is."""
        if not FOOTER_BYTES < stored <= stored_bytes(len(data)):
            return False
        code = line.call(["get_from", stored - FOOTER_BYTES], self._name(key), [self._footer_region])
        if code != OTHER_SIZE:
            try:
                _require_loaded(key, code)
            except KeyError:  # it is gone since
                return False
        if code != FOOTER_BYTES:
            return False
        page = line.scratch[self._scope.chunk_bytes :]
        payload_bytes = stored - FOOTER_BYTES
        if payload_bytes == len(data) != length:  # stored as it is by an instance with another setting
            checksum, length = self._scope.checksum(data), len(data)
        if payload_bytes != length:
            return False
        try:
            self._scope.verify(key, page, checksum, payload_bytes, len(data))
        except Corrupt:
            return False
        return True

    def _name(self, key: ChunkKey) -> str:
        return self._prefix + key.hex()

    @contextmanager
    def _line(self, action: str, key: ChunkKey) -> Iterator[tuple[Line, Place]]:
        """A line to the client, and a function that says where the client has a memory. Errors come out with their place."""
        where = f"{self._where}: cannot {action} {key.hex()}"
        try:
            with self._client.connected() as process, process.line(stored_bytes(self._scope.chunk_bytes)) as line:
                yield line, process.region
        except (TierFull, Corrupt) as error:
            raise type(error)(f"{where}: {error}") from None
        except ClientFailed as error:
            raise TierError(f"{where}: {error}") from None
        except TierError as error:
            raise TierError(f"{where}: {error}") from None


def check_master(master: str) -> None:
    """Raises ConfigError unless it is HOST:PORT."""
    host, _, port = master.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in host:
        raise ConfigError(f"mooncake.master must be HOST:PORT, not {master!r}")


def check_machine(config: MooncakeConfig, segment: int) -> None:
    """Raises TierError for what is missing here."""
    if importlib.util.find_spec("mooncake") is None:
        raise TierError("mooncake tier: the client is missing; install lmc-kv[mooncake]")
    free = available_memory().free
    if segment > free:
        raise TierError(
            f"mooncake.segment: {format_size(segment)} is more than the {format_size(free)} that are free; lower it"
        )
    if config.protocol == "rdma" and not any(_RDMA_DEVICES.glob("*")):
        raise TierError("mooncake.protocol is rdma, but this machine has no RDMA device; set it to tcp")


def _require(code: int, *accepted: int) -> None:
    """Raises TierError for a code of failure that is not accepted."""
    if code < 0 and code not in accepted:
        raise TierFull(_meaning(code)) if code == _FULL else TierError(_meaning(code))


def _require_loaded(key: ChunkKey, code: int) -> None:
    """Raises KeyError for a code that says that nothing is there, and ClientFailed, which ends the client, where it may still write."""
    if code in _NOT_THERE:
        raise KeyError(key)
    if code < 0:
        raise ClientFailed(_meaning(code))


def _meaning(code: int) -> str:
    return f"{_MEANINGS.get(code, 'the client failed')} (code {code})"
