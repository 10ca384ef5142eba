"""SET and GET of one large value on a connected socket, without a copy in between.

redis-py copies a value several times (0.28 GB/s for 4 MB values where a bare recv_into gets 3.1 GB/s on the same server), so values go
around it: the payload is sent from the host slot and received into it. One command is in flight at a time, and every operation has a
deadline for all of its bytes together. The kernel keeps it: Python's own time-outs make a socket non-blocking, so that each piece that
fits into the socket's buffer costs a poll and a call, where a blocking one sends the whole value in a single call, and receives as much of
it as is asked for.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Sequence

import xxhash

from lmc.errors import Corrupt

_PIECE = 1 << 20  # bytes received in one call, and hashed while they are in the CPU's cache and the server sends more
_TLS_PIECE = 1 << 18
_LONGEST_LINE = 4096
_TIMEVAL = struct.Struct("@ll")  # seconds, microseconds


class ErrorReply(Exception):
    """The server answered with an error."""


class Wire:
    """A borrowed socket; each command must be answered within so many seconds. Raises OSError when it is not."""

    def __init__(self, sock: socket.socket, seconds: float) -> None:
        self._sock = sock
        # TLS has neither sendmsg nor recvmsg_into, and no time-out of the kernel's.
        self._encrypted = isinstance(sock, ssl.SSLSocket)
        if not self._encrypted:
            sock.settimeout(None)
        self._seconds = seconds
        self._deadline = 0.0

    def command(self, *arguments: bytes | Sequence[bytes | memoryview]) -> None:
        """Send a command; an argument that is a sequence is sent as its parts, one after the other."""
        self._deadline = time.monotonic() + self._seconds
        buffers = [memoryview(b"*%d\r\n" % len(arguments))]
        for argument in arguments:
            parts = [argument] if isinstance(argument, bytes) else argument
            buffers.append(memoryview(b"$%d\r\n" % sum(len(part) for part in parts)))
            buffers += [memoryview(part) for part in parts]
            buffers.append(memoryview(b"\r\n"))
        self._send(buffers)

    def line(self) -> bytes:
        """The reply to a command that is answered in one line. Raises ErrorReply."""
        line, rest = self._line(b"")
        if rest:
            raise Corrupt(f"the reply {line[:40]!r} is followed by {rest[:40]!r}")
        return line

    def bulk(self, head: memoryview, body: memoryview) -> int | None:
        """Receive a value that must be exactly as long as head and body; returns body's xxh3-64, or None when there is no value.

        Raises ErrorReply, and Corrupt for anything else, after which the connection is out of step.
        """
        wanted = b"$%d\r\n" % (len(head) + len(body))
        start, end = bytearray(len(wanted)), bytearray(2)
        left = [memoryview(start), head, body, memoryview(end)]
        before_body = len(start) + len(head)
        received = 0
        while received < before_body:
            count = self._receive(left)
            _advance(left, count)
            received += count
            if start != wanted and (received >= len(start) or b"\r\n" in start):
                begun = bytes(start + head + body[:_LONGEST_LINE])[: min(received, _LONGEST_LINE + 1)]
                self._no_value(begun, len(head) + len(body))
                return None
        position = min(received - before_body, len(body))
        hasher = xxhash.xxh3_64(body[:position])
        while position < len(body):
            piece = body[position : position + _PIECE]
            count = self._receive([piece], whole=True)
            hasher.update(piece[:count])
            position += count
        left = [memoryview(end)]
        _advance(left, max(received - before_body - len(body), 0))
        while left:
            _advance(left, self._receive(left, whole=True))
        if end != b"\r\n":
            raise Corrupt(f"the value is followed by {bytes(end)!r}")
        return hasher.intdigest()

    def _no_value(self, start: bytes, wanted: int) -> None:
        """Judge a reply that does not start as a value of the wanted length does; returns when it says that there is none."""
        line, rest = self._line(start)
        if line == b"$-1" and not rest:
            return
        if line[1:].isdigit():
            raise Corrupt(f"the value has {line[1:].decode()} bytes instead of {wanted}")
        raise Corrupt(f"the reply starts with {line[:40]!r}")

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
        """For one call; option: the kernel's time-out of its direction."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        if self._encrypted:
            self._sock.settimeout(left)
        else:
            whole, rest = divmod(max(1, int(left * 1e6)), 1_000_000)  # 0 would mean no time-out
            self._sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(whole, rest))

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


def _advance(buffers: list[memoryview], count: int) -> None:
    """Take count bytes off the front of the buffers."""
    while buffers and count >= len(buffers[0]):
        count -= len(buffers.pop(0))
    if count:
        buffers[0] = buffers[0][count:]
