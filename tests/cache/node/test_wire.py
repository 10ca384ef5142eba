"""The wire: what is sent arrives as it was, whatever pieces it comes in, and garbage is refused in one line."""

from __future__ import annotations

import socket
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lmc.cache.node.wire as wire
from lmc.cache.keys import KEY_BYTES, Namespace
from lmc.cache.node.channel import Channel
from lmc.errors import NodeError

counts = st.integers(0, 1 << 48)
texts = st.text(max_size=40)
ids = st.binary(min_size=16, max_size=16)
keys = st.integers(0, 5).flatmap(lambda n: st.binary(min_size=n * KEY_BYTES, max_size=n * KEY_BYTES))
seconds = st.floats(0, 1e9)
events = st.one_of(
    st.builds(wire.Begin, counts, texts, texts, st.booleans()),
    st.builds(wire.Lookup, counts, counts, counts, counts, keys),
    st.builds(wire.Admit, counts, counts),
    st.builds(wire.Store, counts, counts, keys, counts, counts),
    st.builds(wire.End, counts, seconds),
    st.builds(wire.Done, counts, texts),
    st.builds(wire.Quiet, counts),
)
batch = st.builds(wire.Batch, counts, st.lists(events, max_size=8))
replies = st.one_of(
    st.builds(wire.Found, st.integers(-1, 1 << 48), st.dictionaries(texts, counts, max_size=3), texts),
    st.builds(wire.Loads, st.lists(counts), st.lists(counts), st.lists(counts)),
    st.builds(wire.Stores, st.lists(counts), st.lists(counts), st.lists(counts), counts),
)
NAMESPACE = Namespace("vllm", "m", "", "u8", "l", 128)
ATTACH = wire.Attach("e", NAMESPACE, "bf16", 4096, [0, 1], [bytes(16), bytes([1]) * 16], 1, 0.05, 5.0, False)


def body(message: wire.Message) -> bytes:
    return wire.frame(message)[wire.HEAD_BYTES :]


@given(batch)
def test_a_batch_arrives_as_it_was(sent: wire.Batch) -> None:
    assert wire.read(wire.batches, body(sent)) == sent


@given(counts, st.lists(replies, max_size=6))
def test_answers_arrive_as_they_were(number: int, sent: list[wire.Reply]) -> None:
    answers = wire.Answers(number, sent, wire.Figures({"host": (1, 2)}, {}, {"disk": 3}))
    assert wire.read(wire.answers, body(answers)) == answers


def test_greetings_arrive_as_they_were() -> None:
    assert wire.read(wire.greetings, body(ATTACH)) == ATTACH
    taking = wire.TakeMemory(bytes(16), 3)
    assert wire.read(wire.greetings, body(taking)) == taking


@given(st.binary(max_size=200), st.sampled_from(["greetings", "worker_messages", "welcomes", "batches", "answers"]))
def test_garbage_is_refused_in_one_line(garbage: bytes, name: str) -> None:
    try:
        wire.read(getattr(wire, name), garbage)
    except NodeError as error:
        assert "\n" not in str(error)


@given(batch, st.data())
def test_a_damaged_batch_is_refused_or_is_another_batch(sent: wire.Batch, data: st.DataObject) -> None:
    raw = bytearray(body(sent))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        assert isinstance(wire.read(wire.batches, bytes(raw)), wire.Batch)
    except NodeError:
        pass


def test_a_message_of_another_kind_or_with_more_in_it_is_refused() -> None:
    with pytest.raises(NodeError, match="something else"):
        wire.read(wire.batches, body(ATTACH))
    with pytest.raises(NodeError, match="something else"):
        wire.read(wire.worker_messages, b"\x92\x03\x05")


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(NodeError, match="something else"):
        wire.read(wire.batches, body(wire.Batch(1, [wire.Admit(-1, 0)])))


def test_keys_must_be_whole() -> None:
    assert wire.split(bytes(64)) == [bytes(32), bytes(32)]
    with pytest.raises(NodeError, match="no whole number"):
        wire.split(bytes(33))


def pair() -> tuple[socket.socket, Channel]:
    one, other = socket.socketpair()
    return one, Channel(other)


@given(st.lists(batch, max_size=5), st.data())
def test_frames_arrive_whole_in_whatever_pieces(sent: Sequence[wire.Batch], data: st.DataObject) -> None:
    raw, channel = pair()
    stream = wire.PREAMBLE + b"".join(map(wire.frame, sent))
    got: list[bytes] = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        raw.sendall(stream[:size])
        stream = stream[size:]
        got += channel.take()
    assert [wire.read(wire.batches, one) for one in got] == list(sent)
    raw.close()
    with pytest.raises(NodeError, match="has ended"):
        channel.take()
    channel.close()


@given(st.binary(min_size=1, max_size=300))
def test_a_stranger_is_recognised(garbage: bytes) -> None:
    raw, channel = pair()
    raw.sendall(garbage)
    raw.close()
    try:
        while True:
            channel.take()
    except NodeError as error:
        assert "\n" not in str(error)
    finally:
        channel.close()


def test_another_version_is_named() -> None:
    raw, channel = pair()
    raw.sendall(wire.PREAMBLE[:-1] + bytes([wire.VERSION + 1]))
    with pytest.raises(NodeError, match=f"version {wire.VERSION + 1} of the wire, this side version {wire.VERSION}"):
        channel.take()
    channel.close()
    raw.close()


def test_a_frame_that_is_too_long_is_refused_before_it_comes() -> None:
    raw, channel = pair()
    raw.sendall(wire.PREAMBLE + (wire.MOST_FRAME_BYTES + 1).to_bytes(4, "little"))
    with pytest.raises(NodeError, match="the limit is"):
        channel.take()
    with pytest.raises(NodeError, match="too long"):
        wire.frame(wire.Store(0, 0, bytes(wire.MOST_FRAME_BYTES), 0, 0))
    channel.close()
    raw.close()


def test_what_the_peer_does_not_read_waits_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmc.cache.node.channel.MOST_WAITING_BYTES", 1 << 20)
    raw, channel = pair()
    message = wire.Store(0, 0, bytes(KEY_BYTES * 1000), 0, 0)
    with pytest.raises(NodeError, match="stopped reading"):
        for _ in range(10_000):
            channel.put(message)
    channel.close()
    raw.close()
