"""The wire against a peer that sends in pieces of any size, without a server."""

from __future__ import annotations

import itertools
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.cache.tiers import redis_wire
from lmc.cache.tiers.format import FOOTER_BYTES
from lmc.cache.tiers.redis_wire import ErrorReply, Wire
from lmc.errors import Corrupt

BODY, FOOTER = 3_000, 16
VALUE = random.Random(1).randbytes(BODY + FOOTER)
REPLY = b"$%d\r\n%s\r\n" % (len(VALUE), VALUE)


@contextmanager
def peer(sends: list[bytes], seconds: float = 60.0) -> Iterator[tuple[Wire, socket.socket]]:
    """A wire whose other end answers a command with these pieces, one by one."""
    here, there = socket.socketpair()

    def send() -> None:
        for piece in sends:
            there.sendall(piece)

    with here, there:
        sender = threading.Thread(target=send)
        sender.start()
        try:
            wire = Wire(here, seconds)
            wire.command(b"GET", b"key")
            yield wire, there
        finally:
            sender.join()  # before the sockets are closed under it; the pieces fit into their buffers


def room(size: int) -> memoryview:
    return memoryview(bytearray(size))


def cut(data: bytes, places: list[int]) -> list[bytes]:
    bounds = [0, *sorted({place % (len(data) + 1) for place in places}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(bounds) if start < end]


def receive(reply: bytes, places: list[int], piece: int = 1 << 20) -> tuple[int | None, bytes, bytes]:
    body, footer = bytearray(BODY), bytearray(FOOTER)
    with pytest.MonkeyPatch.context() as patch, peer(cut(reply, places), seconds=60.0) as (wire, _):
        patch.setattr(redis_wire, "_PIECE", piece)
        found = wire.bulk(memoryview(body), memoryview(footer), xxhash.xxh3_64(), room)
    return (None, b"", b"") if found is None else (found[1], bytes(found[0]), bytes(footer))


places = st.lists(st.integers(0, 4_000), max_size=12)


@settings(deadline=None)
@given(places, st.sampled_from([1 << 20, BODY, 1_000, 7]))
def test_a_value_arrives_however_it_is_cut(places: list[int], piece: int) -> None:
    digest, body, footer = receive(REPLY, places, piece)
    assert body + footer == VALUE
    assert digest == xxhash.xxh3_64_intdigest(body)


@settings(deadline=None)
@given(places, st.sampled_from([1 << 20, 100, 7]), st.integers(1, BODY - 1))
def test_a_shorter_value_arrives_however_it_is_cut(places: list[int], piece: int, size: int) -> None:
    value = VALUE[: size + FOOTER]
    digest, body, footer = receive(b"$%d\r\n%s\r\n" % (len(value), value), places, piece)
    assert body + footer == value
    assert digest == xxhash.xxh3_64_intdigest(body)


@pytest.mark.parametrize("size", [0, 1, FOOTER, BODY + FOOTER + 1, 99_999])
def test_a_value_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(Corrupt, match=f"has {size} bytes instead of {BODY + FOOTER}"):
        receive(b"$%d\r\n%s\r\n" % (size, bytes(min(size, 5_000))), [])


@settings(deadline=None)
@given(places)
def test_absence_arrives_however_it_is_cut(places: list[int]) -> None:
    assert receive(b"$-1\r\n", places)[0] is None


@settings(deadline=None)
@given(places, st.text(max_size=300))
def test_an_error_arrives_however_it_is_cut(places: list[int], text: str) -> None:
    said = text.replace("\r", " ").replace("\n", " ")
    with pytest.raises(ErrorReply) as caught:
        receive(b"-ERR %s\r\n" % said.encode(), places)
    assert str(caught.value) == f"ERR {said}"


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=200), places)
def test_no_other_reply_is_a_value(reply: bytes, places: list[int]) -> None:
    with pytest.raises((Corrupt, ErrorReply)):
        receive(b"!" + reply + b"\r\n", places)


def test_what_follows_a_reply_is_noticed() -> None:
    with pytest.raises(Corrupt, match="followed by"), peer([b"+OK\r\n+OK\r\n"]) as (wire, _):
        wire.line()
    with pytest.raises(Corrupt):
        receive(b"$-1\r\n+OK\r\n", [])


def test_a_reply_without_an_end_is_given_up() -> None:
    with pytest.raises(Corrupt, match="starts with"), peer([b"-" + b"x" * 20_000]) as (wire, _):
        wire.line()


@pytest.mark.parametrize("size", [4_097, 9_000])
def test_garbage_as_long_as_a_value_is_judged_without_waiting_for_more(size: int) -> None:
    with pytest.raises(Corrupt, match="starts with"), peer([b"x" * size]) as (wire, _):
        wire.bulk(memoryview(bytearray(9_000)), memoryview(bytearray(FOOTER)), xxhash.xxh3_64(), room)


def test_a_closed_connection_is_an_error() -> None:
    here, there = socket.socketpair()
    there.close()
    with here, pytest.raises(OSError):
        Wire(here, 1.0).command(b"GET", b"key")


def test_the_deadline_holds_for_the_whole_reply() -> None:
    with pytest.raises(TimeoutError), peer([REPLY[:-10]], seconds=0.1) as (wire, _):
        wire.bulk(memoryview(bytearray(BODY)), memoryview(bytearray(FOOTER)), xxhash.xxh3_64(), room)
    over = threading.Event()

    def trickle(there: socket.socket) -> None:
        for byte in REPLY[100:]:
            there.sendall(bytes([byte]))
            if over.wait(0.1):
                return

    with peer([REPLY[:100]], seconds=0.5) as (wire, there):
        sender = threading.Thread(target=trickle, args=(there,))
        sender.start()
        try:
            with pytest.raises(TimeoutError):  # if each byte gave it new time, the whole reply would arrive
                wire.bulk(memoryview(bytearray(BODY)), memoryview(bytearray(FOOTER)), xxhash.xxh3_64(), room)
        finally:
            over.set()
            sender.join()
    here, there = socket.socketpair()
    with here, there, pytest.raises(TimeoutError):
        Wire(here, 0.1).set(b"key", memoryview(bytes(50_000_000)), lambda _: b"", xxhash.xxh3_64())  # nobody reads


def parse_command(data: bytes) -> list[bytes]:
    """An independent reading of a command."""
    count, _, rest = data.partition(b"\r\n")
    assert count[:1] == b"*"
    arguments = []
    for _ in range(int(count[1:])):
        length, _, rest = rest.partition(b"\r\n")
        assert length[:1] == b"$"
        size = int(length[1:])
        arguments.append(rest[:size])
        assert rest[size : size + 2] == b"\r\n"
        rest = rest[size + 2 :]
    assert rest == b""
    return arguments


def sent(say: Callable[[Wire], None], bytes_at_once: int = 1 << 20) -> bytes:
    """What the other end of a wire reads."""
    here, there = socket.socketpair()
    received = bytearray()

    def read() -> None:
        while piece := there.recv(bytes_at_once):
            received.extend(piece)

    reader = threading.Thread(target=read)
    reader.start()
    with there:
        with here:
            say(Wire(here, 30.0))
        reader.join()
    return bytes(received)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=50), min_size=1, max_size=6))
def test_a_command_says_its_arguments(arguments: list[bytes]) -> None:
    assert parse_command(sent(lambda wire: wire.command(*arguments))) == arguments


def footer(checksum: int) -> bytes:
    return checksum.to_bytes(8, "little") * (FOOTER_BYTES // 8)


@settings(deadline=None)
@given(
    st.integers(1, 5_000),
    st.sampled_from([1 << 20, 5_000, 1_000, 7]),
    st.lists(st.binary(max_size=9), max_size=2),
    st.integers(0, 2**32),
)
def test_a_value_is_sent_with_its_checksum_behind_it(size: int, piece: int, options: list[bytes], seed: int) -> None:
    body = random.Random(seed).randbytes(size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redis_wire, "_PIECE", piece)
        command = parse_command(
            sent(lambda wire: wire.set(b"key", memoryview(body), footer, xxhash.xxh3_64(), options))
        )
    assert command == [b"SET", b"key", body + footer(xxhash.xxh3_64_intdigest(body)), *options]


def test_a_large_value_is_sent_in_parts_to_a_slow_reader() -> None:
    body = random.Random(3).randbytes(5_000_001)
    command = parse_command(sent(lambda wire: wire.set(b"key", memoryview(body), footer, xxhash.xxh3_64()), 100_000))
    assert command == [b"SET", b"key", body + footer(xxhash.xxh3_64_intdigest(body))]
