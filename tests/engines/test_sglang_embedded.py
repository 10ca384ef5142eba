"""The embedded model on SGLang: what the real weights answer does not change, in this process or in the next one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmc.model import EMBEDDED
from tests.engines.sglang_server import SglangServer
from tests.engines.test_sglang import assert_same, files_of
from tests.services import redis_server

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.service, pytest.mark.timeout(1800)]

# Arbitrary token ids; 330 of them are 5 pages and a rest.
ONE, OTHER = ([1 + (index * index * 7919 + 31 * index + shift) % 20_000 for index in range(330)] for shift in (0, 977))


def test_cold_device_host_disk_and_redis_answer_alike(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with redis_server(tmp_path) as redis:
        settings: dict[str, object] = {
            "host.capacity": "512MiB",
            "disk.path": str(disk),
            "redis.url": redis.url,
            "lookup_deadline": 1.0,
        }
        with SglangServer(EMBEDDED, tmp_path / "one", settings=settings) as one:
            other = one.generate(OTHER)
            one.settle()
            only_in_redis = files_of(disk)
            cold, device, other_device = one.generate(ONE), one.generate(ONE), one.generate(OTHER)
            one.settle()
            one.flush()
            host = one.generate(ONE)
        assert len(only_in_redis) == 5
        for file in only_in_redis:
            file.unlink()
        with SglangServer(EMBEDDED, tmp_path / "two", settings=settings) as two:
            from_disk, from_redis = two.generate(ONE), two.generate(OTHER)
            assert two.metric("lmc_hit_tokens_total", tier="disk") == 320
            assert two.metric("lmc_hit_tokens_total", tier="redis") == 320
    answers = (other, cold, device, other_device, host, from_disk, from_redis)
    assert [(answer["device"], answer["loaded"]) for answer in answers] == [
        (0, 0),
        (0, 0),
        (320, 0),
        (320, 0),
        (0, 320),
        (0, 320),
        (0, 320),
    ]
    # The engine rounds a prompt that it computes in one go differently from a rest behind a prefix, by how much depends on the processor.
    # Behind the same prefix nothing may differ.
    for loaded in (host, from_disk):
        assert (loaded["tokens"], loaded["logprobs"]) == (device["tokens"], device["logprobs"])
    assert (from_redis["tokens"], from_redis["logprobs"]) == (other_device["tokens"], other_device["logprobs"])
    assert_same(device, cold)
    assert other_device["tokens"] == other["tokens"]
