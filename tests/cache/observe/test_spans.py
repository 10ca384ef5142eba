from __future__ import annotations

import json
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from lmc.cache.observe.accounting import Span, Spans
from lmc.cache.plan import Report
from tests.cache.instance import CHUNK_BYTES, NOBODY, Instance, prompt, settings


def span(name: str) -> Span:
    return Span(name, 8, {"host": 0}, None, 0.0, 0.0, 0.0)


def read(instance: Instance) -> list[dict[str, Any]]:
    found = instance.scheduler._accounting.spans.read()["requests"]
    assert isinstance(found, list)
    return found


def test_only_the_newest_are_kept():
    spans = Spans(lambda: 7.0, keep=3)
    for index in range(5):
        spans.add(span(f"r{index}"))
    spans.loaded({"r0": (10, 1.0), "r4": (10, 1.0)})
    spans.loaded({"r4": (5, 0.5)})
    answer = spans.read(2)
    assert answer["now_s"] == 7.0
    assert [(s["request"], s["load_bytes"], s["load_seconds"]) for s in answer["requests"]] == [
        ("r3", 0, 0.0),
        ("r4", 15, 1.5),
    ]
    assert spans.read(0)["requests"] == []


def test_ranks_load_side_by_side():
    merged = Report(loads={"a": (10, 2.0), "b": (1, 1.0)}).merge(Report(loads={"a": (10, 3.0)}))
    assert merged.loads == {"a": (20, 3.0), "b": (1, 1.0)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_span_says_what_was_loaded_from_where_and_when(ranks: int, tmp_path: Path):
    tokens = prompt(1, 33)
    first = Instance(settings(disk_path=str(tmp_path)), ranks)
    first.serve(tokens)
    first.serve(tokens)
    cold, warm = read(first)
    assert (cold["load_bytes"], cold["load_seconds"], cold["hit_tokens"]) == (0, 0.0, {"device": 0})
    assert cold["miss"] is not None
    assert warm["load_bytes"] == 4 * CHUNK_BYTES * ranks
    assert warm["load_seconds"] > 0
    assert (warm["tokens"], warm["hit_tokens"]) == (33, {"device": 0, "host": 32})
    assert warm["miss"] is None
    first.close()

    second = Instance(settings(disk_path=str(tmp_path)), ranks)
    second.serve(tokens)
    (staged,) = read(second)
    assert staged["hit_tokens"] == {"device": 0, "disk": 32}
    assert staged["asked_s"] < staged["answered_s"] <= staged["admitted_s"], "the wait for the disk lies between"
    second.close()


def test_a_request_that_is_never_admitted_leaves_none():
    instance = Instance(settings())
    instance.scheduler.lookup("gone", prompt(1, 20), 0, NOBODY)
    instance.scheduler.finish("gone")
    assert read(instance) == []
    instance.close()


def test_the_endpoint_serves_them():
    instance = Instance(settings(metrics_enabled=True, metrics_port=0))
    for seed in range(3):
        instance.serve(prompt(seed, 20))
    url = str(instance.scheduler.metrics_url).replace("/metrics", "/requests")
    everything, newest, none = (
        json.load(urllib.request.urlopen(url + query)) for query in ("", "?newest=1", "?newest=0")
    )
    assert [span["request"] for span in everything["requests"]] == ["r1", "r2", "r3"]
    assert newest["requests"] == everything["requests"][-1:]
    assert none["requests"] == []
    assert none["now_s"] >= everything["requests"][-1]["admitted_s"]
    instance.close()


def test_an_answer_comes_in_one_piece():
    instance = Instance(settings(metrics_enabled=True, metrics_port=0))
    where = urllib.parse.urlsplit(str(instance.scheduler.metrics_url))
    with socket.create_connection((where.hostname, where.port), timeout=20) as client:
        for _ in range(3):
            client.sendall(b"GET /requests?newest=0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(1 << 16).endswith(b"}\n"), "else a client would take its own delay for the clock's"
    instance.close()
