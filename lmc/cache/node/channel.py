"""A non-blocking connection that carries frames of the wire. It never waits, except where it is asked to."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from contextlib import suppress

from lmc.cache.node.wire import HEAD_BYTES, MOST_FRAME_BYTES, PREAMBLE, VERSION, Message, frame
from lmc.errors import NodeAbsent, NodeError

MOST_WAITING_BYTES = 64 << 20  # a peer that lets more pile up has stopped
_READ_BYTES = 64 << 10
_MOST_DESCRIPTORS = 1
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_SO_PEERPIDFD = 77  # Linux 6.5
_SO_PEERGROUPS = 59


class Channel:
    """Every method that sends or receives raises NodeError when the connection is of no use any more; close it then."""

    def __init__(self, connection: socket.socket, *, takes_descriptor: bool = False) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.descriptor = -1  # one that came with a message; the caller closes it
        self._takes_descriptor = takes_descriptor
        self._out = bytearray(PREAMBLE)
        self._in = bytearray()
        self._read = memoryview(bytearray(_READ_BYTES))  # a fresh one for each read would cost more than the read
        self._met = False  # the peer's preamble has come
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def fileno(self) -> int:
        return self.socket.fileno()

    @property
    def waiting(self) -> bool:
        """Whether something is not sent yet."""
        return bool(self._out)

    def put(self, message: Message) -> None:
        """Send as much as the socket takes; flush() sends the rest."""
        raw = frame(message)
        if not self._out:  # as nearly always
            try:
                raw = raw[self.socket.send(raw, socket.MSG_NOSIGNAL) :]
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as error:
                raise _ended(error) from None
            if not raw:
                return
        self._out += raw
        self.flush()
        if len(self._out) > MOST_WAITING_BYTES:
            raise NodeError("node: the peer has stopped reading")

    def put_descriptor(self, message: Message, descriptor: int) -> None:
        """The same, with a descriptor. What was put before must be sent."""
        raw = frame(message)
        try:
            sent = 0 if self._out else socket.send_fds(self.socket, [raw], [descriptor])
        except OSError as error:
            raise NodeError(f"node: cannot send the memory: {error.strerror}") from None
        if not sent:
            raise NodeError("node: the peer does not read")
        self._out += raw[sent:]

    def flush(self) -> None:
        while self._out:
            try:
                sent = self.socket.send(self._out, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise _ended(error) from None
            if sent == len(self._out):
                self._out = bytearray()
            else:
                del self._out[:sent]

    def take(self) -> list[bytes]:
        """The frames that have come in whole, without their heads."""
        while True:
            try:
                size = self._receive()
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                raise _ended(error) from None
            if not size:
                if self._in and self._met:
                    frames = self._frames()
                    if frames:
                        return frames  # the end is met again at the next call
                raise _ended(None)
            if size < _READ_BYTES:
                if self._met and not self._in and self._is_one_frame(size):  # as nearly always
                    return [bytes(self._read[HEAD_BYTES:size])]
                self._in += self._read[:size]
                break
            self._in += self._read[:size]
        return self._frames() if self._in else []

    def wait(self, seconds: float) -> None:
        """Until something has come in, or could be sent that waits, or the time is over."""
        poll = self._poll
        if self._out:
            poll = select.poll()
            poll.register(self.socket, select.POLLIN | select.POLLOUT)
        poll.poll(max(seconds, 0.0) * 1000)

    def ask(self, message: Message | None, seconds: float) -> bytes:
        """Send a message, and wait for the next frame. Raises NodeError when the time is over."""
        until = time.monotonic() + seconds
        if message is not None:
            self.put(message)
        while not (frames := self.take()):
            left = until - time.monotonic()
            if left <= 0:
                raise NodeError(f"node: no answer within {seconds:g} s")
            self.wait(left)
            self.flush()
        if len(frames) > 1:
            raise NodeError("node: the peer sent more than one answer")
        return frames[0]

    def close(self) -> None:
        self.socket.close()
        self.close_descriptor()

    def close_descriptor(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _receive(self) -> int:
        """How much has come into the read buffer."""
        if not self._takes_descriptor:
            return self.socket.recv_into(self._read)
        data, descriptors, _, _ = socket.recv_fds(self.socket, _READ_BYTES, _MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        for one in descriptors:
            if self.descriptor >= 0:
                os.close(self.descriptor)
            self.descriptor = one
        self._read[: len(data)] = data
        return len(data)

    def _is_one_frame(self, size: int) -> bool:
        return size > HEAD_BYTES and int.from_bytes(self._read[:HEAD_BYTES], "little") == size - HEAD_BYTES

    def _frames(self) -> list[bytes]:
        buffer = self._in
        at = 0
        if not self._met:
            if not PREAMBLE.startswith(buffer[: len(PREAMBLE)]):
                raise NodeError(_stranger(bytes(buffer[: len(PREAMBLE)])))
            if len(buffer) < len(PREAMBLE):
                return []
            self._met = True
            at = len(PREAMBLE)
        frames = []
        while len(buffer) - at >= HEAD_BYTES:
            length = int.from_bytes(buffer[at : at + HEAD_BYTES], "little")
            if length > MOST_FRAME_BYTES:
                raise NodeError(f"node: the peer sent a message of {length} bytes; the limit is {MOST_FRAME_BYTES}")
            end = at + HEAD_BYTES + length
            if end > len(buffer):
                break
            frames.append(bytes(buffer[at + HEAD_BYTES : end]))
            at = end
        if at == len(buffer):
            self._in = bytearray()
        else:
            del buffer[:at]
        return frames


def connect(path: str, seconds: float, *, takes_descriptor: bool = False) -> Channel:
    """Raises NodeError in one line that says what is wrong with the socket."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    connection.settimeout(seconds)
    try:
        connection.connect(path)
    except OSError as error:
        connection.close()
        kind = NodeAbsent if error.errno in (errno.ENOENT, errno.ECONNREFUSED) else NodeError
        raise kind(f"node: {_unreachable(path, error)}") from None
    return Channel(connection, takes_descriptor=takes_descriptor)


class Peer:
    """The process at the other end of a connection, as the kernel knows it."""

    def __init__(self, connection: socket.socket) -> None:
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        self.pid, self.uid, self.gid = _CREDENTIALS.unpack(raw)
        self._connection = connection

    def groups(self) -> set[int]:
        groups = {self.gid}
        with suppress(OSError):
            raw = self._connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * 1024)
            groups.update(struct.unpack(f"{len(raw) // 4}I", raw))
        return groups

    def watch(self) -> int:
        """A descriptor that becomes readable when the process has ended. Raises NodeError."""
        try:
            return self._connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        except OSError as error:
            if error.errno not in (errno.ENOPROTOOPT, errno.EINVAL):
                raise NodeError(f"node: process {self.pid} cannot be watched: {error.strerror}") from None
        try:
            return os.pidfd_open(self.pid)
        except OSError as error:
            raise NodeError(
                f"node: process {self.pid} cannot be watched: {error.strerror}; before Linux 6.5, node and engines "
                "must share their process namespace"
            ) from None


def _ended(error: OSError | None) -> NodeError:
    return NodeError("node: the connection has ended" + (f": {error.strerror}" if error is not None else ""))


def _stranger(start: bytes) -> str:
    if start[:-1] == PREAMBLE[:-1] and len(start) == len(PREAMBLE):
        return (
            f"node: the peer speaks version {start[-1]} of the wire, this side version {VERSION}; install the same lmc"
        )
    return "node: the peer does not speak the wire of lmc's nodes; check the path of the socket"


def _unreachable(path: str, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return f"there is no socket {path}; start `lmc node --socket {path}`"
    if error.errno == errno.ECONNREFUSED:
        return f"nobody listens at {path}; start `lmc node --socket {path}`"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{path} may not be used by this user; set node_group, or run engines and node as the same user"
    return f"cannot connect to {path}: {error.strerror or error}"
