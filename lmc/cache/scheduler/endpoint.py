"""The HTTP endpoint of a cache: GET /metrics for Prometheus, /stats for people, /requests for whoever asks where a request's time went;
POST /pin, /unpin, /prefetch and /clear for administrators.

Commands are JSON objects. Where the endpoint listens on this machine only, they need no token unless one is configured; elsewhere they
need it always. A browser cannot be tricked into sending one: it doesn't send application/json to another site unasked, and a Host header
that is no address of ours is refused.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeout
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import ValidationError

from lmc.cache.config import AdminConfig, MetricsConfig
from lmc.cache.observe.accounting import KEEP
from lmc.cache.scheduler.admin import Admin, Clear, Mailbox, Pin, Prefetch, Result, Unpin
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
        commands: Admin,
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
        endpoint = self

        class Handler(_Handler):
            def __init__(self, *arguments: object) -> None:
                self.endpoint = endpoint
                super().__init__(*arguments)  # type: ignore[arg-type]  # passed on as the server gave them

        self._server = ThreadingHTTPServer((metrics.host, metrics.port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://{metrics.host}:{self._server.server_port}/metrics"
        self._thread = Thread(target=self._server.serve_forever, name="lmc-endpoint", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def run(
        self, path: str, body: bytes, host: str, content_type: str, authorization: str
    ) -> tuple[HTTPStatus, Result]:
        """Check a command and hand it to the scheduler. Raises Refused."""
        kind = COMMANDS.get(path)
        if kind is None:
            raise Refused(HTTPStatus.NOT_FOUND, f"there is no {path}; there are {', '.join(COMMANDS)}")
        self._authorize(host, content_type, authorization)
        try:
            command = kind.model_validate_json(body or b"{}")
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "body"
            raise Refused(HTTPStatus.BAD_REQUEST, f"{where}: {first['msg']}") from None
        future = self._mailbox.put(lambda: self._commands.run(command))
        try:
            return HTTPStatus.OK, future.result(_WAIT_SECONDS)
        except FutureTimeout:
            return HTTPStatus.ACCEPTED, {"queued": "the engine is idle; the command runs with the next request"}
        except ConfigError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from None

    def _authorize(self, host: str, content_type: str, authorization: str) -> None:
        if not self._admin.enabled:
            raise Refused(HTTPStatus.FORBIDDEN, "commands are off; set admin.enabled")
        if content_type.partition(";")[0].strip().lower() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send Content-Type: application/json")
        token = self._admin.token
        if token is not None:
            if not hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode()):
                raise Refused(HTTPStatus.UNAUTHORIZED, "send Authorization: Bearer TOKEN with admin.token")
        elif not self._local:
            raise Refused(
                HTTPStatus.FORBIDDEN, f"the endpoint listens on {self._host}; set admin.token to allow commands"
            )
        elif not is_loopback(host.rpartition(":")[0] or host):
            raise Refused(HTTPStatus.FORBIDDEN, f"unexpected Host {host!r}")


class _Handler(BaseHTTPRequestHandler):
    endpoint: Endpoint
    timeout = 10.0
    protocol_version = "HTTP/1.1"
    # Head and body in one write: a second one would wait 40 ms for the client's delayed acknowledgement.
    wbufsize = 1 << 16

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path == "/metrics":
            self._answer(HTTPStatus.OK, generate_latest(self.endpoint.registry), CONTENT_TYPE_LATEST)
        elif path == "/stats":
            self._answer_json(HTTPStatus.OK, self.endpoint.stats())
        elif path == "/requests":
            newest = query.removeprefix("newest=")
            self._answer_json(HTTPStatus.OK, self.endpoint.spans(int(newest) if newest.isdigit() else KEEP))
        else:
            there_are = "there are /metrics, /stats and /requests"
            self._answer_json(HTTPStatus.NOT_FOUND, {"error": f"there is no {path}; {there_are}"})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > _MAX_BODY:
            self.close_connection = True
            self._answer_json(HTTPStatus.BAD_REQUEST, {"error": f"a body of at most {_MAX_BODY} bytes is needed"})
            return
        body = self.rfile.read(int(length))
        header = self.headers.get
        try:
            status, result = self.endpoint.run(
                self.path, body, header("Host", ""), header("Content-Type", ""), header("Authorization", "")
            )
        except Refused as refused:
            status, result = refused.status, {"error": str(refused)}
        self._answer_json(status, result)

    def log_message(self, format: str, *arguments: object) -> None:
        logger.debug("lmc: endpoint: " + format, *arguments)

    def _answer_json(self, status: HTTPStatus, result: Result) -> None:
        self._answer(status, json.dumps(result).encode() + b"\n", "application/json")

    def _answer(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
