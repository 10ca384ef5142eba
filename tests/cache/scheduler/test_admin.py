"""The HTTP endpoint of a running cache, and what its commands do."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lmc.cache.keys import hashed_name
from lmc.cache.scheduler.admin import MOST_COMMANDS, MOST_TOKENS, Prefetch
from lmc.cache.scheduler.cache import Identity
from lmc.cache.scheduler.endpoint import is_loopback
from tests.cache.instance import CHUNK_BYTES, Instance, prompt, settings


@pytest.fixture
def instance() -> Iterator[Instance]:
    opened = Instance(settings(metrics_enabled=True, host_capacity=12 * CHUNK_BYTES))
    yield opened
    opened.close()


@contextmanager
def stepping(instance: Instance) -> Iterator[None]:
    """An engine that is at work, so that commands are run."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.005):
            instance.pump()

    thread = threading.Thread(target=work)
    thread.start()
    yield
    stop.set()
    thread.join()


def call(instance: Instance, path: str, body: object = None, **headers: str) -> tuple[int, dict[str, object]]:
    data = None if body is None else (body if isinstance(body, bytes) else json.dumps(body).encode())
    url = instance.scheduler.metrics_url.removesuffix("/metrics") + path
    named = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, named), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_pinned_chunks_stay_until_they_are_unpinned(instance):
    tokens = prompt(1, 50)
    instance.serve(tokens)
    with stepping(instance):
        assert call(instance, "/pin", {"tokens": tokens, "owner": "me", "seconds": 60}) == (
            200,
            {"chunks": 6, "pinned": 6},
        )
    for seed in range(2, 6):
        instance.serve(prompt(seed, 50))
    assert instance.serve(tokens).loaded == 48
    with stepping(instance):
        assert call(instance, "/unpin", {"owner": "me"}) == (200, {"unpinned": True})
        assert call(instance, "/unpin", {"owner": "me"}) == (200, {"unpinned": False})
    for seed in range(2, 6):
        instance.serve(prompt(seed, 50))
    assert instance.serve(tokens).loaded == 0


def test_an_expected_prompt_is_brought_into_host_memory(tmp_path):
    values = {"metrics_enabled": True, "disk_path": tmp_path, "disk_shared": True, "lookup_deadline": 60}
    own, other = Instance(settings(**values)), Instance(settings(**values))
    try:
        own.serve(prompt(1, 50))
        other.serve(prompt(2, 50))
        own.close()
        own = Instance(settings(**values))
        with stepping(own):
            for seed in (1, 2):
                assert call(own, "/prefetch", {"tokens": prompt(seed, 50)})[0] == 200
        own.settle()
        assert own.serve(prompt(1, 50)).sources == {"host": 48}
        assert own.serve(prompt(2, 50)).sources == {"host": 48}
        assert own.metric("staged_chunks_total", tier="disk") == 12
    finally:
        own.close()
        other.close()


def test_clear_by_prefix_tenant_and_all(instance):
    base = prompt(1, 16)
    one, other = base + prompt(2, 16), base + prompt(3, 16)
    instance.serve([*one, 1])
    instance.serve([*other, 1])
    of_t, salted = Identity(tenant=hashed_name("t")), Identity(tenant=hashed_name("t"), salt=hashed_name("s"))
    instance.serve(prompt(4, 17), of_t)
    instance.serve(prompt(4, 17), salted)
    with stepping(instance):
        for salt, held in (("", 2), ("s", 2), ("other", 0)):
            command = {"tokens": prompt(4, 17), "owner": f"salt {salt}", "tenant": "t", "salt": salt}
            assert call(instance, "/pin", command)[1]["pinned"] == held
            call(instance, "/unpin", {"owner": f"salt {salt}"})
    with stepping(instance):
        assert call(instance, "/clear", {"tokens": one[:24]}) == (200, {"in_use": 0})
    assert instance.scheduler.lookup("a", [*one, 1], 0, Identity()) == 16
    assert instance.scheduler.lookup("b", [*other, 1], 0, Identity()) == 32
    with stepping(instance):
        assert call(instance, "/clear", {"tenant": "t"}) == (200, {"in_use": 0})
    assert instance.scheduler.lookup("c", prompt(4, 17), 0, of_t) == 0
    assert instance.scheduler.lookup("s", prompt(4, 17), 0, salted) == 0, "a tenant's chunks under whatever salt"
    assert instance.scheduler.lookup("d", [*other, 1], 0, Identity()) == 32
    with stepping(instance):
        assert call(instance, "/clear", {}) == (200, {"in_use": 0})
    assert instance.scheduler.directory.usage()["host"][0] == 0


def test_an_idle_engine_runs_the_command_with_its_next_request(instance):
    tokens = prompt(1, 50)
    instance.serve(tokens)
    status, answer = call(instance, "/clear", {})
    assert status == 202 and "idle" in str(answer["queued"])
    assert instance.scheduler.busy
    assert instance.serve(tokens).miss == "cleared"


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/pin", {"tokens": [1, 2], "owner": "me"}, 400, "no full chunk"),
        ("/pin", {"tokens": "x", "owner": "me"}, 400, "tokens"),
        ("/pin", {"tokens": [1], "owner": ""}, 400, "owner"),
        ("/pin", {"tokens": [1], "owner": "me", "secs": 5}, 400, "secs"),
        ("/pin", {"tokens": [-1] * 8, "owner": "me"}, 400, "tokens"),
        ("/prefetch", {"tokens": [1 << 32] * 8}, 400, "tokens"),
        ("/clear", {"tokens": [True, 1.5] * 4}, 400, "tokens"),
        ("/clear", b'{"tokens": [%s]}' % (b"9" * 5_000), 400, "number out of range"),
        ("/clear", '{"tokens": ["\u00b2"]}'.encode(), 400, "tokens"),
        ("/pin", b'{"tokens": [1,1,1,1,1,1,1,1], "owner": "\\ud800"}', 400, "JSON"),
        ("/pin", {"tokens": [1] * 8, "owner": "me" * 200}, 400, "owner"),
        ("/pin", {"tokens": [1] * 8, "owner": "me", "seconds": -1}, 400, "seconds"),
        ("/clear", {"tenant": "t" * 300}, 400, "tenant"),
        ("/clear", {"salt": "s"}, 400, "belong to a prompt"),
        ("/clear", b"[" * 100_000, 400, "JSON"),
        ("/unpin", {}, 400, "owner"),
        ("/clear", b"{", 400, "JSON"),
        ("/stop", {}, 404, "/pin, /unpin, /prefetch, /clear"),
    ],
)
def test_bad_commands_are_refused(instance, path, body, status, message):
    tokens = prompt(1, 50)
    instance.serve(tokens)
    with stepping(instance):
        code, answer = call(instance, path, body)
    assert code == status and message in str(answer["error"])
    assert instance.serve(tokens).loaded == 48, "the cache goes on"


def test_commands_that_an_idle_engine_leaves_waiting_take_little_memory(instance):
    """60 expected prompts of a million tokens each; then the engine runs what it took on."""
    body = b'{"tokens": [' + b",".join([b"%d" % (1_000 + index % 9_000) for index in range(1_450_000)]) + b"]}"
    assert 7_000_000 < len(body) < 8 << 20
    statuses = Counter(call(instance, "/prefetch", body)[0] for _ in range(60))
    assert statuses == {202: 2, 503: 58}, "two of them are four million tokens"
    waiting = instance.scheduler._mailbox.waiting
    assert sum(size for _, size, _ in waiting) <= MOST_TOKENS
    held = [cell.cell_contents for work, _, _ in waiting for cell in work.__closure__]
    assert all(one.tokens.itemsize == 4 for one in held if isinstance(one, Prefetch))
    instance.pump()
    assert not waiting
    small = Counter(call(instance, "/unpin", {"owner": "me"})[0] for _ in range(MOST_COMMANDS // 8))
    assert small == {202: MOST_COMMANDS // 8}


def test_other_sites_cannot_send_commands_through_a_browser(instance):
    assert call(instance, "/clear", {}, Content_Type="text/plain")[0] == 415
    assert call(instance, "/clear", {}, Host="evil.example")[0] == 403
    assert call(instance, "/clear", {}, Host="localhost:1")[0] == 202


def test_commands_need_the_token_where_one_is_set_or_others_can_connect():
    for values, expected in (
        ({"admin_token": "secret"}, {"": 401, "Bearer wrong": 401, "Bearer secret": 202}),
        ({"admin_token": "secret", "metrics_host": "0.0.0.0"}, {"": 401, "Bearer secret": 202}),
        ({"metrics_host": "0.0.0.0"}, {"": 403, "Bearer ": 403}),
        ({"admin_enabled": False}, {"": 403}),
    ):
        instance = Instance(settings(metrics_enabled=True, **values))
        try:
            for header, status in expected.items():
                answer = call(
                    instance, "/clear", {}, Authorization=header, Host="localhost:1"
                )  # anybody can claim that
                assert answer[0] == status, (values, header)
            open_to_others = values.get("metrics_host") == "0.0.0.0"
            for path in ("/stats", "/requests"):
                without = call(instance, path, Host="localhost:1")[0]
                assert without == (expected[""] if open_to_others else 200)
                if "Bearer secret" in expected:
                    assert call(instance, path, Authorization="Bearer secret", Host="localhost:1")[0] == 200
            with urllib.request.urlopen(instance.scheduler.metrics_url, timeout=60) as answer:
                assert answer.status == 200  # Prometheus brings no token
        finally:
            instance.close()


def test_stats_and_metrics_tell_the_same(instance):
    tokens = prompt(1, 50)
    instance.serve(tokens)
    instance.serve(tokens)
    status, stats = call(instance, "/stats")
    assert status == 200
    bytes_held = {"bytes": 6 * CHUNK_BYTES, "capacity_bytes": 12 * CHUNK_BYTES}
    assert stats["tiers"] == {"host": {"chunks": 6, "capacity": 12, **bytes_held}}
    assert stats["totals"]["requests"] == 2 and stats["by_label"]["hit_tokens"] == {"host": 48}
    with urllib.request.urlopen(instance.scheduler.metrics_url, timeout=60) as answer:
        families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
    assert {"lmc_requests", "lmc_hit_tokens", "lmc_slots_used", "lmc_transfer_seconds"} <= set(families)
    assert families["lmc_slots_used"].samples[0].value == 6
    assert call(instance, "/nothing")[0] == 404


def test_the_endpoint_survives_many_callers_while_the_engine_works(instance):
    def ask() -> None:
        for _ in range(20):
            call(instance, "/stats")
            call(instance, "/pin", {"tokens": prompt(1, 50), "owner": "me"})

    with ThreadPoolExecutor(3) as pool:
        callers = [pool.submit(ask) for _ in range(3)]
        seed = 0
        while not all(caller.done() for caller in callers):
            instance.serve(prompt(seed % 5, 50))
            seed += 1
            time.sleep(0.001)
    for caller in callers:
        caller.result()


def test_loopback_addresses_are_known():
    for host, local in (("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("localhost", True)):
        assert is_loopback(host) is local
    for host in ("0.0.0.0", "10.0.0.1", "example.org", "", "127.0.0.1.example.org"):
        assert not is_loopback(host)
