"""The HTTP endpoint of a cache: GET /metrics for Prometheus, /stats with the state in numbers, /requests with the times of requests;
POST /pin, /unpin, /prefetch and /clear for administrators.

Commands are JSON objects. Where the endpoint listens on this machine only, they need no token unless one is configured; elsewhere they
need it always, and so do /stats and /requests, which tell of requests. A browser cannot be tricked into asking: a request from another
site's page is refused, and so is a Host header that is no address of ours; and it doesn't send application/json to another site unasked.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import re
from collections.abc import Callable
from http import HTTPStatus
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import ValidationError

from lmc.cache.observe.accounting import KEEP
from lmc.cache.scheduler.admin import Clear, Commands, Mailbox, Pin, Prefetch, Result, Unpin
from lmc.cache.scheduler.http_server import Answer, Body, Head, HttpServer
from lmc.cache.sections import AdminConfig, MetricsConfig
from lmc.errors import ConfigError

logger = logging.getLogger(__name__)

COMMANDS: dict[str, type[Pin] | type[Unpin] | type[Prefetch] | type[Clear]] = {
    "/pin": Pin,
    "/unpin": Unpin,
    "/prefetch": Prefetch,
    "/clear": Clear,
}
_WAIT_SECONDS = 1.0  # for the scheduler; an idle one runs a command with the next request
_MAX_BODY = 8 << 20
_NEWEST = re.compile(r"newest=([0-9]{1,9})")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]]*)(?::[0-9]{1,5})?")


class Refused(Exception):
    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Endpoint:
    """Serves until close()."""

    def __init__(
        self,
        metrics: MetricsConfig,
        admin: AdminConfig,
        registry: CollectorRegistry,
        stats: Callable[[], Result],
        spans: Callable[[int], Result],
        commands: Commands,
        mailbox: Mailbox,
    ) -> None:
        """Raises OSError when the port is in use."""
        self.registry = registry
        self.stats = stats
        self.spans = spans
        self._admin = admin
        self._commands = commands
        self._mailbox = mailbox
        self._host = metrics.host
        self._local = is_loopback(metrics.host)
        self._server = HttpServer(metrics.host, metrics.port, self._answer, _failure)
        shown = f"[{metrics.host}]" if ":" in metrics.host else metrics.host
        self.url = f"http://{shown}:{self._server.port}/metrics"

    def close(self) -> None:
        self._server.close()

    async def _answer(self, head: Head, body: Body) -> Answer:
        logger.debug("lmc: endpoint: %s %r", head.method, head.path)
        try:
            if head.method == "POST":
                status, result = await self._command(head, body)
                return _as_json(status, result)
            if head.method != "GET":
                raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, "there are GET and POST")
            return self._read(head)
        except Refused as refused:
            return _failure(refused.status, str(refused))

    def _read(self, head: Head) -> Answer:
        if head.path == "/metrics":
            return Answer(HTTPStatus.OK, generate_latest(self.registry), CONTENT_TYPE_LATEST)
        if head.path not in ("/stats", "/requests"):
            there_are = "there are /metrics, /stats and /requests"
            raise Refused(HTTPStatus.NOT_FOUND, f"there is no {head.path}; {there_are}")
        self._check_sender(head)
        if not self._local:
            self._check_token(head)
        if head.path == "/stats":
            return _as_json(HTTPStatus.OK, self.stats())
        return _as_json(HTTPStatus.OK, self.spans(_newest(head.query)))

    async def _command(self, head: Head, body: Body) -> tuple[HTTPStatus, Result]:
        """Check a command and hand it to the scheduler. Raises Refused."""
        kind = COMMANDS.get(head.path)
        if kind is None:
            raise Refused(HTTPStatus.NOT_FOUND, f"there is no {head.path}; there are {', '.join(COMMANDS)}")
        if not self._admin.enabled:
            raise Refused(HTTPStatus.FORBIDDEN, "commands are off; set admin.enabled")
        self._check_sender(head)
        if head.header("content-type").partition(";")[0].strip().lower() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send Content-Type: application/json")
        if self._admin.token is not None or not self._local:
            self._check_token(head)
        try:
            command = kind.model_validate_json(await body(_MAX_BODY) or b"{}")
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "body"
            raise Refused(HTTPStatus.BAD_REQUEST, f"{where}: {first['msg']}") from None
        num_tokens = len(getattr(command, "tokens", None) or ())
        waiting = self._mailbox.put(lambda: self._commands.run(command), num_tokens)
        if waiting is None:
            raise Refused(
                HTTPStatus.SERVICE_UNAVAILABLE, "too many commands wait; the engine runs them with its next request"
            )
        future = asyncio.wrap_future(waiting)
        await asyncio.wait({future}, timeout=_WAIT_SECONDS)  # which cancels nothing when the time is up
        if not future.done():
            return HTTPStatus.ACCEPTED, {"queued": "the engine is idle; the command runs with the next request"}
        try:
            return HTTPStatus.OK, future.result()
        except ConfigError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from None

    def _check_sender(self, head: Head) -> None:
        """Refuse what a page of another site makes a browser send: by its name for us, or by where it says it comes from."""
        host = head.header("host")
        name = _host_name(host)
        if self._local and not is_loopback(name):
            raise Refused(HTTPStatus.FORBIDDEN, f"unexpected Host {host!r}")
        origin = head.header("origin")
        if origin and urlsplit(origin).netloc != host:
            raise Refused(HTTPStatus.FORBIDDEN, f"unexpected Origin {origin!r}")
        if head.header("sec-fetch-site") not in ("", "none", "same-origin"):
            raise Refused(HTTPStatus.FORBIDDEN, "a page of another site may not ask")

    def _check_token(self, head: Head) -> None:
        token = self._admin.token
        if token is None:
            raise Refused(HTTPStatus.FORBIDDEN, f"the endpoint listens on {self._host}; set admin.token to allow this")
        if not hmac.compare_digest(head.header("authorization").encode("latin-1"), f"Bearer {token}".encode()):
            raise Refused(HTTPStatus.UNAUTHORIZED, "send Authorization: Bearer TOKEN with admin.token")


def _newest(query: str) -> int:
    if not query:
        return KEEP
    match = _NEWEST.fullmatch(query)
    if match is None:
        raise Refused(HTTPStatus.BAD_REQUEST, "write ?newest=N with a whole number of at most 9 digits")
    return int(match[1])


def _failure(status: HTTPStatus, message: str) -> Answer:
    return _as_json(status, {"error": message})


def _as_json(status: HTTPStatus, result: Result) -> Answer:
    return Answer(status, json.dumps(result).encode() + b"\n")


def _host_name(host: str) -> str:
    """Of "name:port", "1.2.3.4" or "[::1]:port"."""
    match = _HOST.fullmatch(host)
    return match[1] if match is not None else ""


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
