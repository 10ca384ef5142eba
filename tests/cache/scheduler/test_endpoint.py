"""The endpoint against clients that are slow, many, odd or of another site."""

from __future__ import annotations

import hmac
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from http import HTTPStatus
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lmc.cache.scheduler import http_server
from lmc.cache.scheduler.http_server import Answer, Body, Head, HttpServer
from tests.cache.instance import Instance, prompt, settings
from tests.services import LOCAL, wait_until


@pytest.fixture
def instance() -> Iterator[Instance]:
    opened = Instance(settings(metrics_enabled=True))
    opened.serve(prompt(1, 50))
    yield opened
    opened.close()


def connect(instance: Instance) -> socket.socket:
    where = urlsplit(str(instance.scheduler.metrics_url))
    assert where.hostname is not None and where.port is not None
    return socket.create_connection((where.hostname, where.port), timeout=30)


def read_all(client: socket.socket) -> bytes:
    found = b""
    while piece := client.recv(1 << 16):
        found += piece
    return found


def ask(instance: Instance, raw: str | bytes) -> tuple[int, str]:
    """Status and body of one request, whose head needs no Connection: close of its own."""
    with connect(instance) as client:
        client.sendall(raw if isinstance(raw, bytes) else raw.encode())
        client.shutdown(socket.SHUT_WR)
        answer = read_all(client)
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), body.decode()


def get(path: str, **headers: str) -> str:
    named = {"Host": "localhost:1", "Connection": "close"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    return f"GET {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in named.items()) + "\r\n"


def post(path: str, body: bytes = b"{}", **headers: str) -> bytes:
    named = {"Content_Type": "application/json", "Content_Length": str(len(body))} | headers
    return get(path, **named).replace("GET", "POST", 1).encode() + body


def is_closed(client: socket.socket) -> bool:
    client.settimeout(0.01)
    try:
        return client.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_idle_connections_take_neither_threads_nor_the_place_of_a_scrape(instance: Instance) -> None:
    before = threading.active_count()
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(instance)) for _ in range(http_server.MOST_CONNECTIONS + 40)]
        for _ in range(3):
            assert ask(instance, get("/metrics"))[0] == 200
        assert threading.active_count() <= before  # threads of earlier tests may end meanwhile
        wait_until(lambda: all(is_closed(client) for client in idle[:40]), "the end of the oldest connections")
        assert not is_closed(idle[-1])  # it may still ask
        idle[-1].settimeout(30)
        idle[-1].sendall(get("/metrics").encode())
        assert read_all(idle[-1]).startswith(b"HTTP/1.1 200")


def test_a_request_that_comes_too_slowly_is_given_up(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "REQUEST_SECONDS", 0.2)
    for raw in (b"", b"GET /metr", post("/clear", b"{}")[:-1]):
        with connect(instance) as client:
            client.sendall(raw)
            assert read_all(client) == b""
    monkeypatch.undo()
    assert ask(instance, get("/metrics"))[0] == 200


def test_an_answer_that_is_not_taken_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "ANSWER_SECONDS", 0.2)

    async def answer(head: Head, body: Body) -> Answer:
        return Answer(HTTPStatus.OK, bytes(64 << 20))

    server = HttpServer(LOCAL, 0, answer, lambda status, message: Answer(status, message.encode()))
    try:
        with socket.create_connection((LOCAL, server.port), timeout=30) as client:
            client.sendall(get("/").encode())
            wait_until(lambda: bool(server._connections), "the connection")
            wait_until(lambda: not server._connections, "its end")
            taken = 0
            with suppress(ConnectionError):
                while piece := client.recv(1 << 20):
                    taken += len(piece)
            assert taken < 64 << 20
    finally:
        server.close()


def test_a_kept_connection_serves_many_requests(instance: Instance) -> None:
    with connect(instance) as client:
        for _ in range(5):
            client.sendall(get("/requests?newest=0", Connection="keep-alive").encode())
            assert client.recv(1 << 16).endswith(b"}\n")
        client.sendall(get("/requests?newest=0").encode())
        assert b"Connection: close" in read_all(client)


@pytest.mark.parametrize("number", ["²", "9" * 5000, "-1", "", "1.5", "1e3", "0x1", "٣", " 1"])
def test_odd_numbers_are_bad_requests(instance: Instance, number: str) -> None:
    assert ask(instance, get(f"/requests?newest={number}".replace(" ", "%20")))[0] == 400
    assert ask(instance, get("/requests?oldest=1"))[0] == 400
    status, _ = ask(instance, post("/clear", Content_Length=number or "x"))
    assert status in ((400, 413) if number == " 1" else (400,))


def test_heads_and_bodies_have_a_largest_size(instance: Instance) -> None:
    assert ask(instance, get("/metrics", X="x" * (64 << 10)))[0] == 431
    assert ask(instance, post("/clear", Content_Length=str(9 << 20)))[0] == 413
    assert ask(instance, post("/clear", Content_Length="9999999999"))[0] == 413
    assert ask(instance, post("/clear", Transfer_Encoding="chunked"))[0] == 411
    tokens = json.dumps({"tokens": [1] * (1 << 20), "owner": "me"}).encode()
    assert ask(instance, post("/pin", tokens, Expect="100-continue"))[0] in (100, 202)


def test_who_has_no_token_is_refused_before_its_body_is_read() -> None:
    instance = Instance(settings(metrics_enabled=True, admin_token="secret"))
    try:
        with connect(instance) as client:
            client.sendall(post("/clear", Content_Length=str(4 << 20)))  # most of which never comes
            assert b" 401 " in read_all(client)
    finally:
        instance.close()


def test_the_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def spy(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    instance = Instance(settings(metrics_enabled=True, admin_token="gehäuse"))
    try:
        assert ask(instance, post("/clear", Authorization="Bearer wrong"))[0] == 401
        assert ask(instance, post("/clear", Authorization="Bearer gehäuse"))[0] == 202
    finally:
        instance.close()
    assert compared == ["Bearer gehäuse".encode()] * 2


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "127.0.0.1:9400"}, 200),
        ({"Host": "[::1]"}, 200),
        ({"Host": "evil.example"}, 403),  # a name that was made to point here
        ({"Host": "127.0.0.1.evil.example:80"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
    ],
)
def test_pages_of_other_sites_learn_nothing(instance: Instance, headers: dict[str, str], status: int) -> None:
    for path in ("/stats", "/requests"):
        assert ask(instance, get(path, **headers))[0] == status
    assert ask(instance, post("/clear", **headers))[0] == (202 if status == 200 else status)


def test_an_address_of_ip_version_6() -> None:
    instance = Instance(settings(metrics_enabled=True, metrics_host="::1"))
    try:
        assert str(instance.scheduler.metrics_url).startswith("http://[::1]:")
        assert ask(instance, get("/stats", Host="[::1]:1"))[0] == 200
    finally:
        instance.close()


def test_a_cache_without_a_thread_for_its_endpoint_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refused(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(http_server, "Thread", Refused)
    instance = Instance(settings(metrics_enabled=True))
    try:
        assert instance.scheduler.metrics_url is None
        assert "cannot start a thread; raise the limit of processes" in caplog.text
        instance.serve(prompt(1, 50))
        assert instance.serve(prompt(1, 50)).loaded == 48
    finally:
        instance.close()


def test_the_second_on_a_port_says_that_it_has_none(instance: Instance, caplog: pytest.LogCaptureFixture) -> None:
    port = urlsplit(str(instance.scheduler.metrics_url)).port
    second = Instance(settings(metrics_enabled=True, metrics_port=port))
    try:
        assert second.scheduler.metrics_url is None
        assert f"no metrics endpoint: cannot listen on 127.0.0.1:{port}" in caplog.text
    finally:
        second.close()


@pytest.mark.parametrize("method", ["PUT", "HEAD", "OPTIONS", "get"])
def test_other_methods_are_refused(instance: Instance, method: str) -> None:
    assert ask(instance, get("/stats").replace("GET", method, 1))[0] == 405


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=300),
        st.builds(
            lambda line, rest: line + b"\r\n" + rest + b"\r\n\r\n",
            st.sampled_from([b"GET /stats HTTP/1.1", b"POST /pin HTTP/1.1", b"GET  HTTP/1.1", b"GET * HTTP/1.1"]),
            st.one_of(
                st.binary(max_size=60),
                st.sampled_from([b"Host: a\r\nHost: b", b"Content-Length: 1\r\nContent-Length: 2"]),
            ),
        ),
    )
)
def test_nothing_that_comes_in_stops_it(instance: Instance, raw: bytes) -> None:
    with connect(instance) as client:
        client.sendall(raw)
        client.shutdown(socket.SHUT_WR)
        answer = read_all(client)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 ")
    assert not answer.startswith(b"HTTP/1.1 5")
    assert ask(instance, get("/stats"))[0] == 200


def test_few_bodies_are_in_memory_at_once() -> None:
    async def answer(head: Head, body: Body) -> Answer:
        return Answer(HTTPStatus.OK, str(len(await body(1 << 20))).encode())

    server = HttpServer(LOCAL, 0, answer, lambda status, message: Answer(status, message.encode()))
    try:
        with ExitStack() as stack:
            slow = [stack.enter_context(socket.create_connection((LOCAL, server.port), timeout=30)) for _ in range(12)]
            for client in slow:
                client.sendall(post("/", bytes(1 << 20))[:-1])
            wait_until(lambda: server._bodies.locked(), "bodies that are being read")
            for client in slow:
                client.sendall(b"0")
            for client in slow:
                assert read_all(client).endswith(b"1048576")
    finally:
        server.close()
