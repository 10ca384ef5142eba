"""The linker on a real SGLang server: outputs unchanged, whatever the cache does. One server for each state that needs a new process."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmc.cache.tiers.format import FOOTER_BYTES, checksum, decode, encode
from tests.engines.scenario import TOKEN, prompt
from tests.engines.sglang_server import SglangServer
from tests.engines.vllm_driver import VllmDriver
from tests.services import RedisServer, redis_server

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.timeout(1800)]

PAGE = 64
TOLERANCE = 1e-5
LONG, HALF, DAMAGED, NOISE = prompt(50, 2000), prompt(51, 900), prompt(52, 700), prompt(53, 330)


def assert_same(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert got["tokens"] == wanted["tokens"]
    assert got["logprobs"] == pytest.approx(wanted["logprobs"], abs=TOLERANCE)


@pytest.fixture(scope="module")
def reference(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What SGLang answers without lmc, each prompt computed from its first token."""
    prompts = {
        "long": LONG,
        "half": HALF,
        "damaged": DAMAGED,
        "noise": NOISE,
        "shared": [*LONG[:1000], *prompt(54, 200)],
    }
    answers = {}
    with SglangServer(tiny_llama, tmp_path_factory.mktemp("plain"), settings=None) as server:
        for name, tokens in prompts.items():
            server.flush()
            answers[name] = server.generate(tokens)
            assert (answers[name]["device"], answers[name]["loaded"]) == (0, 0)
    return answers


@pytest.fixture(scope="module")
def disk_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def first(
    tiny_llama: Path, disk_folder: Path, redis: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SglangServer]:
    settings: dict[str, object] = {
        "host.capacity": "256MiB",
        "disk.path": str(disk_folder),
        "redis.url": redis.url,
        "lookup_deadline": 1.0,
    }
    with SglangServer(tiny_llama, tmp_path_factory.mktemp("first"), settings=settings) as server:
        yield server


def test_cold_device_and_host_answer_alike(first: SglangServer, reference: dict[str, dict[str, Any]]) -> None:
    cold, device = first.generate(LONG), first.generate(LONG)
    first.settle()
    first.flush()
    loaded, again = first.generate(LONG), first.generate(LONG)
    for answer in (cold, device, loaded, again):
        assert_same(answer, reference["long"])
    assert [(one["device"], one["loaded"]) for one in (cold, device, loaded, again)] == [
        (0, 0),
        (1984, 0),
        (0, 1984),
        (1984, 0),
    ]


def test_a_shared_prefix_is_loaded_up_to_the_last_common_page(
    first: SglangServer, reference: dict[str, dict[str, Any]]
) -> None:
    first.flush()
    answer = first.generate([*LONG[:1000], *prompt(54, 200)])
    assert (answer["device"], answer["loaded"]) == (0, 960)
    assert_same(answer, reference["shared"])


def test_device_and_host_add_up(first: SglangServer, reference: dict[str, dict[str, Any]]) -> None:
    first.flush()
    first.generate(LONG[:700])  # the device now holds 10 pages
    answer = first.generate(LONG)
    assert (answer["device"], answer["loaded"]) == (640, 1344)
    assert_same(answer, reference["long"])


def test_requests_of_one_batch_load_together(first: SglangServer, reference: dict[str, dict[str, Any]]) -> None:
    first.generate(HALF)
    first.settle()
    first.flush()
    answers: dict[str, dict[str, Any]] = {}

    def ask(name: str, tokens: list[int]) -> None:
        answers[name] = first.generate(tokens)

    threads = [threading.Thread(target=ask, args=pair) for pair in (("long", LONG), ("half", HALF))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (answers["long"]["loaded"], answers["half"]["loaded"]) == (1984, 896)
    for name, answer in answers.items():
        assert answer["tokens"] == reference[name]["tokens"]
        assert answer["logprobs"] == pytest.approx(
            reference[name]["logprobs"], abs=1e-3
        )  # a batch of two sums otherwise


def test_different_salts_share_nothing(first: SglangServer) -> None:
    tokens = prompt(55, 200)
    loaded = []
    for salt in ("a", "b", "a", None):
        first.flush()
        loaded.append(first.generate(tokens, **({"cache_salt": salt} if salt else {}))["loaded"])
        first.settle()
    assert loaded == [0, 0, 192, 0]


def test_generated_tokens_are_stored_once_a_prompt_repeats_them(first: SglangServer) -> None:
    tokens = prompt(56, 130)
    output = first.generate(tokens, max_tokens=70)["tokens"]
    conversation = [*tokens, *output, *prompt(57, 10)]
    first.generate(conversation)
    first.settle()
    first.flush()
    assert first.generate(conversation)["loaded"] == 192


def test_a_request_may_bypass_the_cache_and_ask_why(first: SglangServer) -> None:
    tokens = prompt(58, 200)
    first.generate(tokens, wishes={"store": False})
    first.settle()
    first.flush()
    cold = first.generate(tokens, wishes={"explain": True, "token": TOKEN})
    assert cold["explanation"][0] == {"prompt_tokens": 200, "hit_tokens": {"device": 0}, "miss": "never stored"}
    first.settle()
    first.flush()
    assert first.generate(tokens, wishes={"bypass": True})["loaded"] == 0
    first.flush()
    warm = first.generate(tokens, wishes={"explain": True, "token": TOKEN})
    assert warm["loaded"] == 192
    assert warm["explanation"][0] == {"prompt_tokens": 200, "hit_tokens": {"device": 0, "host": 192}, "miss": None}


def test_nothing_is_left_over_and_everything_is_counted(first: SglangServer) -> None:
    first.generate(LONG)
    first.settle()
    assert first.metric("lmc_pins") == 0
    assert first.metric("lmc_hit_tokens_total", tier="host") > 0
    assert first.metric("lmc_device_tokens_total") > 0
    assert first.metric("lmc_failures_total", operation="load") == 0


def test_vllm_beside_it_on_the_same_redis_never_meets_its_chunks(
    first: SglangServer, redis: RedisServer, reference: dict[str, dict[str, Any]], tiny_llama: Path
) -> None:
    """Two real engines, one model, the same tokens and chunk size. What SGLang loads after this is in the last test of this file."""
    first.generate(LONG)
    first.settle()
    held = chunks_by_namespace(redis)
    (sglang,) = held
    settings: dict[str, Any] = {"host.capacity": "256MiB", "redis.url": redis.url, "chunk_tokens": PAGE, "strict": True}
    settings |= {"lookup_deadline": 5.0, "metrics.enabled": False}
    python = str(Path(sys.prefix).parent / "vllm" / "bin" / "python")
    answers = []
    for _ in range(2):
        with VllmDriver(tiny_llama, python=python, settings=settings) as vllm:
            answers += vllm.generate([LONG], max_tokens=6)
            vllm.call("settle")
        now = chunks_by_namespace(redis)
        assert now.pop(sglang) == held[sglang]
        assert list(now.values()) == [len(LONG) // PAGE]
    cold, warm = answers
    assert (cold["cached"], warm["cached"]) == (0, 1984)
    assert warm["tokens"] == cold["tokens"]
    assert warm["logprobs"] == pytest.approx(cold["logprobs"], abs=TOLERANCE)
    first.flush()
    assert_same(first.generate(LONG), reference["long"])


def chunks_by_namespace(redis: RedisServer) -> Counter[bytes]:
    with redis.client() as client:
        return Counter(key.rsplit(b":", 2)[0] for key in client.scan_iter(b"lmc:*"))


@pytest.fixture(scope="module")
def second(
    first: SglangServer, tiny_llama: Path, disk_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SglangServer]:
    """A new process on the disk of the first, which was killed; some files are damaged in every way in between."""
    first.generate(LONG)
    first.settle()
    for tokens in (DAMAGED, NOISE):
        before = set(files_of(disk_folder))
        first.generate(tokens)
        first.settle()
        new = sorted(set(files_of(disk_folder)) - before)
        assert len(new) == len(tokens) // PAGE
        if tokens is DAMAGED:
            damage(new)
        else:
            for file in new:
                fill_with_noise(file)
    first.kill()
    settings: dict[str, object] = {"host.capacity": "256MiB", "disk.path": str(disk_folder)}
    with SglangServer(tiny_llama, tmp_path_factory.mktemp("second"), settings=settings) as server:
        yield server


def files_of(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size > 64 * 1024]


def damage(files: list[Path]) -> None:
    """One flipped bit, one short file, one file that is gone, in turn."""
    for index, file in enumerate(files):
        content = bytearray(file.read_bytes())
        if index % 3 == 0:
            content[len(content) // 2] ^= 0x10
            file.write_bytes(content)
        elif index % 3 == 1:
            file.write_bytes(content[: len(content) // 2])
        else:
            file.unlink()


def fill_with_noise(file: Path) -> None:
    """Other bytes before a valid footer: what no checksum can tell from the truth."""
    content = file.read_bytes()
    size = len(content) - FOOTER_BYTES
    footer = decode(content[size:])
    noise = np.random.default_rng(0).standard_normal(size // 4).astype(np.float32).tobytes()
    file.write_bytes(noise + encode(replace(footer, checksum=checksum(noise))))


def test_a_new_process_loads_from_disk(second: SglangServer, reference: dict[str, dict[str, Any]]) -> None:
    answer = second.generate(LONG)
    assert (answer["device"], answer["loaded"]) == (0, 1984)
    assert_same(answer, reference["long"])
    assert second.metric("lmc_hit_tokens_total", tier="disk") == 1984
    second.settle()
    second.flush()
    assert_same(second.generate(LONG), reference["long"])
    assert second.metric("lmc_hit_tokens_total", tier="host") == 1984


def test_damaged_and_missing_chunks_are_recomputed(second: SglangServer, reference: dict[str, dict[str, Any]]) -> None:
    loaded = []
    for _ in range(
        5
    ):  # what is on disk counts as good until it is read, so each request may find one more damaged file
        second.flush()
        answer = second.generate(DAMAGED)
        assert_same(answer, reference["damaged"])
        loaded.append(answer["loaded"])
        second.settle()
    assert loaded == sorted(loaded)
    assert loaded[0] < loaded[-1] == 640
    assert second.metric("lmc_failures_total", operation="stage") > 0
    assert second.metric("lmc_failures_total", operation="load") == 0


def test_the_stored_bytes_are_really_used(second: SglangServer, reference: dict[str, dict[str, Any]]) -> None:
    """Without this, all of the above could pass with a cache that never loads anything."""
    answer = second.generate(NOISE)
    assert answer["loaded"] == 320
    assert answer["logprobs"] != pytest.approx(reference["noise"]["logprobs"], abs=1e-2)


def test_another_process_loads_from_redis_and_goes_on_without_it(
    first: SglangServer,
    reference: dict[str, dict[str, Any]],
    redis: RedisServer,
    tiny_llama: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    settings: dict[str, object] = {"host.capacity": "256MiB", "redis.url": redis.url, "lookup_deadline": 1.0}
    with SglangServer(tiny_llama, tmp_path_factory.mktemp("third"), settings=settings) as third:
        shared = third.generate(LONG)
        assert (shared["device"], shared["loaded"]) == (0, 1984)
        assert_same(shared, reference["long"])
        redis.kill()
        assert_same(third.generate(HALF), reference["half"])
        third.flush()
        kept = third.generate(LONG)
        assert kept["loaded"] == 1984  # from its own host memory
        assert_same(kept, reference["long"])
