"""Instances that share a Redis or S3 server: hits of each other's chunks, and nothing worse than misses when the server fails."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lmc.cache.tiers.redis import RedisTier
from lmc.errors import TierError
from tests import services
from tests.cache.instance import CHUNK_BYTES, NOBODY, Instance, prompt, serve_side_by_side, settings

pytestmark = pytest.mark.service


@contextmanager
def running(*instances: Instance) -> Iterator[None]:
    try:
        yield
    finally:
        for instance in instances:
            instance.close()


def redis_settings(server: services.RedisServer, **values: object) -> dict[str, object]:
    """With times that a busy machine does not run into."""
    return {"redis_url": server.url, "redis_timeout": 60, "lookup_deadline": 60, "load_deadline": 60, **values}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_chunk_written_by_one_is_a_hit_of_the_other_at_its_first_question(tmp_path, num_ranks):
    with services.redis_server(tmp_path) as server:
        values = redis_settings(server)
        one, two = (Instance(settings(**values), num_ranks) for _ in range(2))
        with running(one, two):
            for seed in (1, 2, 3):
                tokens = prompt(seed, 50)
                assert one.serve(tokens).miss == "never stored"
                assert two.serve(tokens).sources == {"redis": 48}
                assert two.serve(tokens).sources == {"host": 48}
            assert two.metric("ask_seconds_count", tier="redis") == 3
            assert two.metric("written_chunks_total", tier="redis") == 0, "what is there is not written again"
            assert len(server.client().keys("*")) == 3 * 6 * num_ranks


@pytest.mark.parametrize("connections", [1, 3])
def test_so_many_values_are_on_their_way_at_once(tmp_path, monkeypatch, connections):
    """Each way; six chunks would take more."""
    lock, busy, most = threading.Lock(), Counter(), Counter()

    def slowly(call, *arguments):
        with lock:
            busy[call] += 1
            most[call] = max(most[call], busy[call])
        time.sleep(0.05)
        try:
            return call(*arguments)
        finally:
            with lock:
                busy[call] -= 1

    put, get = RedisTier.put, RedisTier.get
    monkeypatch.setattr(RedisTier, "put", lambda *arguments: slowly(put, *arguments))
    monkeypatch.setattr(RedisTier, "get", lambda *arguments: slowly(get, *arguments))
    with services.redis_server(tmp_path) as server:
        values = redis_settings(server, redis_connections=connections)
        one, two = (Instance(settings(**values)) for _ in range(2))
        with running(one, two):
            one.serve(prompt(1, 50))
            assert two.serve(prompt(1, 50)).sources == {"redis": 48}
    assert most == {put: connections, get: connections}


def test_the_first_tier_that_has_a_chunk_serves_it_and_others_get_a_copy(tmp_path):
    with services.redis_server(tmp_path) as server:
        one = Instance(settings(**redis_settings(server)))
        two = Instance(settings(**redis_settings(server), disk_path=tmp_path / "disk"))
        with running(one, two):
            tokens = prompt(1, 50)
            one.serve(tokens)
            two.serve(tokens)
            assert two.scheduler.directory.usage()["disk"][0] == 6
            server.client().flushall()
        three = Instance(settings(**redis_settings(server), disk_path=tmp_path / "disk"))
        with running(three):
            assert three.serve(tokens).sources == {"disk": 48}


def test_chunks_that_redis_evicted_are_misses(tmp_path):
    with services.redis_server(tmp_path) as server:
        one, two = (Instance(settings(**redis_settings(server))) for _ in range(2))
        with running(one, two):
            tokens = prompt(1, 50)
            one.serve(tokens)
            assert two.scheduler.lookup("r", tokens, 0, NOBODY) is None
            services.wait_until(lambda: bool(two.scheduler._presence._answers), "the answer")
            server.client().flushall()
            while two.scheduler.lookup("r", tokens, 0, NOBODY) is None:
                two.pump()
            two.scheduler.finish("r")
            two.settle()
            assert two.metric("failure_causes_total", operation="stage", tier="redis", cause="absent") == 6
            assert two.scheduler.directory.known_remote()["redis"] == 0
            assert two.serve(tokens).loaded == 0
            assert two.serve(tokens).loaded == 48


def test_a_server_that_evicts_never_breaks_readers_or_writers(tmp_path):
    """Two instances fill it beyond its memory all the time; serve() compares every byte."""
    with services.redis_server(tmp_path, "--maxmemory-policy", "allkeys-random") as server, server.client() as client:
        pair = [Instance(settings(**redis_settings(server), host_capacity=16 * CHUNK_BYTES)) for _ in range(2)]
        with running(*pair):
            client.config_set("maxmemory", client.info("memory")["used_memory"] + 300_000)
            serve_side_by_side(pair, 30)
            assert all(instance.metric("staged_chunks_total", tier="redis") > 0 for instance in pair)
            assert client.info("stats")["evicted_keys"] > 0


def test_a_corrupt_value_is_deleted_and_replaced(tmp_path):
    with services.redis_server(tmp_path) as server:
        one, two, three = (Instance(settings(**redis_settings(server))) for _ in range(3))
        with running(one, two, three):
            tokens = prompt(1, 50)
            one.serve(tokens)
            client = server.client()
            for name in client.keys("*"):
                value = bytearray(client.get(name))
                value[-3] ^= 4
                client.set(name, bytes(value))
            served = two.serve(tokens)
            assert served.loaded == 0
            assert two.metric("failure_causes_total", operation="stage", tier="redis", cause="corrupt") > 0
            two.settle()
            two.serve(tokens)
            two.settle()
            assert three.serve(tokens).loaded >= 8


def test_an_unreachable_server_costs_a_warning_and_is_used_when_it_comes(tmp_path, caplog):
    with services.redis_server(tmp_path) as server:
        server.kill()
        instance = Instance(settings(**redis_settings(server, redis_timeout=0.5, lookup_deadline=0.2)))
        with running(instance):
            assert "running without it until it answers" in caplog.text
            tokens = prompt(1, 50)
            assert instance.serve(tokens).loaded == 0
            for seed in range(2, 6):
                instance.serve(prompt(seed, 50))
            assert instance.serve(tokens).sources == {"host": 48}
            assert instance.metric("breaker_open", tier="redis", direction="write") == 1
            assert instance.metric("breaker_events_total", tier="redis", direction="write", event="openings") >= 1
            assert instance.metric("failure_causes_total", operation="write", tier="redis", cause="unavailable") > 0
            with services.redis_server(tmp_path, port=server.port), server.client() as client:
                until = time.monotonic() + 120
                while not client.keys("*") and time.monotonic() < until:
                    instance.serve(tokens)
                    time.sleep(0.1)
                assert client.keys("*"), "the breaker tries again, and what was dropped is written"
                instance.settle()
                assert instance.metric("breaker_open", tier="redis", direction="write") == 0


@pytest.mark.fault
def test_a_paused_server_delays_nobody_beyond_the_deadlines(tmp_path, caplog):
    with services.redis_server(tmp_path) as server:
        values = redis_settings(
            server, redis_timeout=600, lookup_deadline=0.2, load_deadline=0.5, disk_path=tmp_path / "disk"
        )
        instance = Instance(settings(**values))
        with running(instance):
            tokens = prompt(1, 50)
            instance.serve(tokens)
            server.pause()
            try:
                for seed in range(2, 8):
                    assert instance.serve(prompt(seed, 50), settle=False).loaded == 0
                assert instance.serve(tokens, settle=False).sources == {"host": 48}
                assert instance.metric("misses_total", reason="remote deadline") > 0
                assert "remote deadline: request" in caplog.text
            finally:
                server.resume()
            instance.settle()
            assert instance.serve(prompt(2, 50)).loaded == 48
            assert instance.scheduler.directory.usage()["disk"][0] == 7 * 6


def test_strict_refuses_to_start_without_the_server(tmp_path):
    with services.redis_server(tmp_path) as server:
        server.kill()
        with pytest.raises(TierError, match="redis tier"):
            Instance(settings(**redis_settings(server, strict=True)))


def test_instances_share_an_s3_bucket():
    with services.s3_server("chunks") as endpoint:
        values = {
            "s3_bucket": "chunks",
            "s3_endpoint": endpoint,
            "s3_access_key_id": "id",
            "s3_secret_access_key": "secret",
            "lookup_deadline": 60,
            "load_deadline": 60,
            "host_capacity": 16 * CHUNK_BYTES,
        }
        one, two = (Instance(settings(**values)) for _ in range(2))
        with running(one, two):
            for seed in (1, 2, 3):
                tokens = prompt(seed, 50)
                one.serve(tokens)
                assert two.serve(tokens).sources == {"s3": 48}
            assert two.metric("ask_seconds_count", tier="s3") == 3, "a hit at the first question"
