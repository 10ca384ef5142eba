"""SET and GET of one large value on a connected socket, without a copy in between.

redis-py copies a value several times (0.28 GB/s for 4 MB values where a bare recv_into gets 3.1 GB/s on the same server), so values go
around it: the payload is sent from the host slot and received into it, and a piece is hashed while others are on their way. One command is
in flight at a time, and every operation has a deadline for all of its bytes together. The kernel keeps it: Python's own time-outs make a
socket non-blocking, so that each piece that fits into the socket's buffer costs a poll and a call, where a blocking one sends a whole piece
in a single call, and receives as much of it as is asked for.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Callable, Sequence

from lmc.cache.tiers.format import FOOTER_BYTES, Hasher
from lmc.errors import Corrupt

_PIECE = (
    1 << 20
)  # bytes sent or received in one call, and hashed while they are in the CPU's cache and the server has others to do
_TLS_PIECE = 1 << 18
_LONGEST_LINE = 4096
_TIMEVAL = struct.Struct("@ll")  # seconds, microseconds


class ErrorReply(Exception):
    """The server answered with an error."""


class Wire:
    """A borrowed socket. Raises OSError if a command is not answered within the time limit, in seconds."""

    def __init__(self, sock: socket.socket, seconds: float) -> None:
        self._sock = sock
        # TLS has neither sendmsg nor recvmsg_into, and no time-out of the kernel's.
        self._encrypted = isinstance(sock, ssl.SSLSocket)
        if not self._encrypted:
            sock.settimeout(None)
        self._seconds = seconds
        self._deadline = 0.0
        self._time_outs: dict[int, float] = {}  # as they are set

    def command(self, *arguments: bytes) -> None:
        self._deadline = time.monotonic() + self._seconds
        self._send([memoryview(b"*%d\r\n" % len(arguments) + _encoded(arguments))])

    def set(
        self,
        name: bytes,
        body: memoryview,
        footer: Callable[[int], bytes],
        hasher: Hasher,
        options: Sequence[bytes] = (),
    ) -> None:
        """Send SET with a value of body and the FOOTER_BYTES that footer returns for what hasher says of body."""
        self._deadline = time.monotonic() + self._seconds
        start = b"*%d\r\n" % (3 + len(options)) + _encoded([b"SET", name]) + b"$%d\r\n" % (len(body) + FOOTER_BYTES)
        unsent = [memoryview(start)]
        for position in range(0, len(body), _PIECE):
            piece = body[position : position + _PIECE]
            hasher.update(piece)
            unsent.append(piece)
            if position + _PIECE < len(body):
                self._send(unsent)
        unsent.append(memoryview(footer(hasher.intdigest()) + b"\r\n" + _encoded(options)))
        self._send(unsent)

    def line(self) -> bytes:
        """The reply to a command that is answered in one line. Raises ErrorReply."""
        line, rest = self._line(b"")
        if rest:
            raise Corrupt(f"the reply {line[:40]!r} is followed by {rest[:40]!r}")
        return line

    def bulk(
        self, body: memoryview, footer: memoryview, hasher: Hasher, room: Callable[[int], memoryview]
    ) -> tuple[memoryview, int] | None:
        """Receive a value that may be as long as body and footer, or shorter; returns what lies before the footer, and what hasher says of
        it; None: there is no value. A value of full length is received into body, a shorter one into room(bytes).

        Raises ErrorReply, and Corrupt for anything else, after which the connection is out of step.
        """
        wanted = b"$%d\r\n" % (len(body) + len(footer))
        start, end = bytearray(len(wanted)), bytearray(2)
        left = [memoryview(start), body, footer, memoryview(end)]
        received = 0
        while received < len(start):
            count = self._receive(left)
            _advance(left, count)
            received += count
            if start != wanted and (received >= len(start) or b"\r\n" in start):
                begun = bytes(start) + bytes(body[: max(received - len(start), 0)]) + bytes(footer) + bytes(end)
                return self._shorter(begun[:received], len(body), footer, hasher, room)
        self._rest(body, received - len(start), footer, end, hasher)
        return body, hasher.intdigest()

    def _shorter(
        self, begun: bytes, most: int, footer: memoryview, hasher: Hasher, room: Callable[[int], memoryview]
    ) -> tuple[memoryview, int] | None:
        """The same for a reply that does not start as a value of full length does, of which begun is here."""
        size = self._length(begun, len(footer), most + len(footer))
        if size is None:
            return None
        if b"\r\n" not in begun:
            raise Corrupt(f"the reply starts with {begun[:40]!r}")
        body, end = room(size - len(footer)), bytearray(2)
        here = memoryview(begun)[begun.index(b"\r\n") + 2 :]
        if len(here) > size + len(end):
            raise Corrupt(f"the value is followed by {bytes(here[size:][:40])!r}")
        body[: len(here)] = here[: len(body)]
        footer[: max(len(here) - len(body), 0)] = here[len(body) : size]
        end[: max(len(here) - size, 0)] = here[size:]
        self._rest(body, len(here), footer, end, hasher)
        return body, hasher.intdigest()

    def _rest(self, body: memoryview, received: int, footer: memoryview, end: bytearray, hasher: Hasher) -> None:
        """Receive what is missing of body, footer and end, of which so many bytes are here."""
        position = min(received, len(body))
        hasher.update(body[:position])
        while position < len(body):
            piece = body[position : position + _PIECE]
            count = self._receive([piece], whole=True)
            hasher.update(piece[:count])
            position += count
        left = [footer, memoryview(end)]
        _advance(left, max(received - len(body), 0))
        while left:
            _advance(left, self._receive(left, whole=True))
        if end != b"\r\n":
            raise Corrupt(f"the value is followed by {bytes(end)!r}")

    def _length(self, start: bytes, least: int, most: int) -> int | None:
        """The length of a value that is not as long as the longest, from the first line of its reply; None: there is none."""
        line, rest = self._line(start[: _LONGEST_LINE + 1])
        if line == b"$-1" and not rest:
            return None
        if not line.startswith(b"$") or not line[1:].isdigit():
            raise Corrupt(f"the reply starts with {line[:40]!r}")
        size = int(line[1:])
        if not least < size < most:
            raise Corrupt(f"the value has {size} bytes instead of {most}")
        return size

    def _line(self, start: bytes) -> tuple[bytes, bytes]:
        """The first line of a reply that begins with start, and what came behind it. Raises ErrorReply."""
        buffer = bytearray(start)
        while b"\r\n" not in buffer:
            if len(buffer) > _LONGEST_LINE:
                raise Corrupt(f"the reply starts with {bytes(buffer[:40])!r}")
            piece = bytearray(_LONGEST_LINE)
            buffer += piece[: self._receive([memoryview(piece)])]
        line, _, rest = bytes(buffer).partition(b"\r\n")
        if line.startswith(b"-"):
            raise ErrorReply(line[1:].decode(errors="replace"))
        return line, rest

    def _set_time_out(self, option: int) -> None:
        """For one call; option: the kernel's time-out of its direction. One that is a hundredth too long is left as it is."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        if self._encrypted:
            self._sock.settimeout(left)
        elif not left <= self._time_outs.get(option, 0.0) <= left + self._seconds / 100:
            whole, rest = divmod(max(1, int(left * 1e6)), 1_000_000)  # 0 would mean no time-out
            self._sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(whole, rest))
            self._time_outs[option] = left

    def _receive(self, into: list[memoryview], *, whole: bool = False) -> int:
        """whole: wait until all of it is there; only where the server has promised as much."""
        self._set_time_out(socket.SO_RCVTIMEO)
        try:
            if self._encrypted:
                count = self._sock.recv_into(into[0])
            elif len(into) == 1:
                count = self._sock.recv_into(into[0], 0, socket.MSG_WAITALL if whole else 0)
            else:
                count, _, _, _ = self._sock.recvmsg_into(into, 0, socket.MSG_WAITALL if whole else 0)
        except BlockingIOError:
            raise TimeoutError("timed out") from None
        if count == 0:
            raise ConnectionResetError("the server closed the connection")
        return count

    def _send(self, buffers: list[memoryview]) -> None:
        """Send all buffers, and empty the list."""
        while buffers:
            self._set_time_out(socket.SO_SNDTIMEO)
            try:
                if self._encrypted:
                    count = self._sock.send(buffers[0][:_TLS_PIECE])
                else:
                    count = self._sock.sendmsg(buffers)
            except BlockingIOError:
                raise TimeoutError("timed out") from None
            _advance(buffers, count)


def _encoded(arguments: Sequence[bytes]) -> bytes:
    return b"".join(b"$%d\r\n%s\r\n" % (len(argument), argument) for argument in arguments)


def _advance(buffers: list[memoryview], count: int) -> None:
    """Remove count bytes from the front of the buffers."""
    while buffers and count >= len(buffers[0]):
        count -= len(buffers.pop(0))
    if count:
        buffers[0] = buffers[0][count:]
