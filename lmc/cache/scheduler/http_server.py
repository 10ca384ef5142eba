"""A small HTTP/1.1 server on one thread of its own, for a process whose interpreter has better things to do.

It holds against clients that are slow, many or odd: connections are bounded, and one more ends the one that has waited longest for a
request; a request must come in, and its answer must be taken, within fixed times; heads and bodies have a largest size, and few bodies are
read at once. A connection that waits costs nothing. It knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from threading import Thread

logger = logging.getLogger(__name__)

MOST_CONNECTIONS = 256
REQUEST_SECONDS = 30.0  # from the last answer, or from the connection, to the last byte of the request
ANSWER_SECONDS = 30.0
MAX_HEAD = 16 << 10
_BODIES_AT_ONCE = 4
_LENGTH = re.compile(r"[0-9]{1,10}")
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


@dataclass(frozen=True)
class Head:
    method: str
    path: str
    query: str
    headers: Mapping[str, str]  # names in lower case

    def header(self, name: str) -> str:
        return self.headers.get(name, "")


@dataclass(frozen=True)
class Answer:
    status: HTTPStatus
    body: bytes
    content_type: str = "application/json"


Body = Callable[[int], Awaitable[bytes]]  # reads the body, of at most so many bytes; raises BadRequest


class BadRequest(Exception):
    """What came in is no request; the connection ends with this answer."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class HttpServer:
    """handle(head, body) answers; it runs on the server's thread and must not block. failure(status, message) makes the other answers."""

    def __init__(
        self,
        host: str,
        port: int,
        handle: Callable[[Head, Body], Awaitable[Answer]],
        failure: Callable[[HTTPStatus, str], Answer],
    ) -> None:
        """Listens until close(). Raises OSError when the port is in use, or no thread can be started."""
        self._socket = _listen(host, port)
        self.port = int(self._socket.getsockname()[1])
        self._handle = handle
        self._failure = failure
        self._waiting: dict[
            asyncio.Task[None], asyncio.StreamWriter
        ] = {}  # connections without a request, oldest first
        self._connections: set[asyncio.Task[None]] = set()
        self._loop = asyncio.SelectorEventLoop()
        self._stop = asyncio.Event()
        self._bodies = asyncio.Semaphore(_BODIES_AT_ONCE)
        self._thread = Thread(target=self._run, name="lmc-endpoint", daemon=True)
        try:
            self._thread.start()
        except (RuntimeError, MemoryError):
            self._socket.close()
            self._loop.close()
            raise OSError(errno.EAGAIN, "cannot start a thread; raise the limit of processes") from None

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._meet, sock=self._socket, limit=MAX_HEAD)
        await self._stop.wait()
        server.close()
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MOST_CONNECTIONS:
            if not self._waiting:
                writer.transport.abort()  # all others are being answered
                return
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest.cancel()
        connection = self._loop.create_task(self._talk(reader, writer))
        self._connections.add(connection)
        self._waiting[connection] = writer
        connection.add_done_callback(self._part)

    def _part(self, connection: asyncio.Task[None]) -> None:
        self._connections.discard(connection)
        self._waiting.pop(connection, None)
        error = None if connection.cancelled() else connection.exception()
        if error is not None:
            logger.error("lmc: a fault in the endpoint ended a connection", exc_info=error)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        me = asyncio.current_task()
        assert me is not None
        try:
            again = True
            while again:
                self._waiting[me] = writer
                again = await self._exchange(me, reader, writer)
        except (OSError, EOFError, TimeoutError):
            pass  # the client went, or was too slow
        finally:
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def _exchange(
        self, me: asyncio.Task[None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """One request and its answer; whether another may follow."""
        keep = False
        try:
            async with asyncio.timeout(REQUEST_SECONDS) as limit:
                head, version = await _read_head(reader)
                left = _body_length(head)
                read = False

                async def body(most: int) -> bytes:
                    nonlocal read
                    if left > most:
                        raise BadRequest(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has at most {most} bytes")
                    if head.header("expect").lower() == "100-continue":
                        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    async with self._bodies:
                        whole = await reader.readexactly(left)
                    read = True
                    limit.reschedule(None)
                    self._waiting.pop(me, None)
                    return whole

                if left == 0:
                    limit.reschedule(None)
                    self._waiting.pop(me, None)
                answer = await self._handle(head, body)
                keep = version == "HTTP/1.1" and "close" not in head.header("connection").lower()
                keep = keep and (read or left == 0)
        except BadRequest as bad:
            answer = self._failure(bad.status, str(bad))
        await _send(writer, answer, keep)
        return keep


async def _read_head(reader: asyncio.StreamReader) -> tuple[Head, str]:
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        raise BadRequest(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"a head has at most {MAX_HEAD} bytes") from None
    first, *lines = raw[:-4].decode("latin-1").split("\r\n")
    parts = first.split(" ")
    if len(parts) != 3 or parts[2] not in ("HTTP/1.0", "HTTP/1.1") or not parts[1].startswith("/"):
        raise BadRequest(HTTPStatus.BAD_REQUEST, "this is no HTTP/1.1 request")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        name = name.lower()
        if not colon or not _NAME.fullmatch(name) or (name in headers and name in ("host", "content-length")):
            raise BadRequest(HTTPStatus.BAD_REQUEST, "a header is malformed")
        headers[name] = value.strip()
    path, _, query = parts[1].partition("?")
    return Head(parts[0], path, query, headers), parts[2]


def _body_length(head: Head) -> int:
    if head.header("transfer-encoding"):
        raise BadRequest(HTTPStatus.LENGTH_REQUIRED, "send the body with a Content-Length")
    text = head.headers.get("content-length", "0")
    if not _LENGTH.fullmatch(text):
        raise BadRequest(HTTPStatus.BAD_REQUEST, "Content-Length is no number")
    return int(text)


async def _send(writer: asyncio.StreamWriter, answer: Answer, keep: bool) -> None:
    """Head and body in one write: a second one would wait 40 ms for the client's delayed acknowledgement."""
    head = (
        f"HTTP/1.1 {answer.status.value} {answer.status.phrase}\r\n"
        f"Content-Type: {answer.content_type}\r\n"
        f"Content-Length: {len(answer.body)}\r\n"
        f"Connection: {'keep-alive' if keep else 'close'}\r\n\r\n"
    )
    writer.write(head.encode("latin-1") + answer.body)
    async with asyncio.timeout(ANSWER_SECONDS):
        await writer.drain()
        while writer.transport.get_write_buffer_size():
            await asyncio.sleep(0.01)  # drain() is content with a buffer that is not full


def _listen(host: str, port: int) -> socket.socket:
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
        listener.listen(128)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener
