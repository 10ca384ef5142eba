"""The linker with tiers below the host: waiting, damage, deadlines, names and sharing."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from lmc.cache.connectors.edge import Wishes
from lmc.cache.keys import KeyChain, root
from lmc.cache.tiers.format import TierScope
from lmc.cache.tiers.redis import RedisTier
from lmc.errors import ConfigError, TierError
from tests.engines.scenario import prompt
from tests.engines.sglang_pool import CHUNK_BYTES, PAGE, Start, equal
from tests.engines.test_sglang import damage
from tests.services import redis_server, wait_until

pytestmark = [pytest.mark.engine, pytest.mark.sglang]


def test_a_request_is_held_while_its_chunks_come_from_disk(start: Start, disk: Path) -> None:
    first = start(disk__path=str(disk))
    first.fill([3, 9, 4], seed=16)
    first.serve(prompt(16, 3 * PAGE + 5), [3, 9, 4])
    first.settle()
    second = start(disk__path=str(disk))
    request = second.arrive(prompt(16, 3 * PAGE + 5))
    assert request.hits == []  # nothing is promised yet
    second.wait(request)
    assert request.hits == [1, 2, 3]
    assert second.load(request, [20, 21, 22])
    assert equal(second.read([20, 21, 22]), first.read([3, 9, 4]))
    second.check_idle()


def test_a_damaged_file_is_never_promised(start: Start, disk: Path) -> None:
    first = start(disk__path=str(disk))
    request = first.serve(prompt(17, 3 * PAGE + 5), [3, 9, 4])
    first.settle()
    from lmc.cache.connectors.sglang.prompts import Prompt

    key = Prompt(request, Wishes(), first.cache.scheduler.namespace, "").keys[1]
    (file,) = [file for file in disk.rglob("*") if file.name == key.hex()]
    file.write_bytes(file.read_bytes()[:-1])
    second = start(disk__path=str(disk))
    again = second.arrive(prompt(17, 3 * PAGE + 5))
    second.wait(again)
    assert again.hits == [1]
    assert second.load(again, [20])


def test_damaged_files_are_replaced_as_they_are_found(start: Start, disk: Path) -> None:
    """What is on disk counts as good until it is read; the requests that run into it put good copies in its place."""
    first = start(disk__path=str(disk))
    pages = list(range(3, 13))
    request = first.serve(prompt(24, 10 * PAGE + 5), pages)
    first.settle()
    from lmc.cache.connectors.sglang.prompts import Prompt

    keys = Prompt(request, Wishes(), first.cache.scheduler.namespace, "").keys
    files = {file.name: file for file in disk.rglob("*")}
    damage([files[key.hex()] for key in keys[2:]])
    second = start(disk__path=str(disk))
    found = []
    for number in range(4):
        again = second.arrive(prompt(24, 10 * PAGE + 5), rid=f"try {number}")
        second.wait(again)
        found.append(len(again.hits))
        assert second.load(again, pages[: found[-1]])
        assert second.offload(again, pages)  # SGLang inserts what was loaded and what was computed
        second.settle()
    assert found[:2] == [2, 5]  # pages 2, 5 and 8 have flipped bits; a scan sees the short and the missing files
    assert found == sorted(found)
    assert found[-1] == 10


def test_a_tier_that_hangs_holds_a_request_no_longer_than_the_deadline(start: Start, disk: Path) -> None:
    first = start(disk__path=str(disk))
    first.serve(prompt(18, 3 * PAGE + 5), [3, 9, 4])
    first.settle()
    second = start(disk__path=str(disk), load_deadline=0.5)
    go: list[bool] = []

    def stuck(*_: object) -> None:
        wait_until(lambda: bool(go), "the test lets go")
        raise TierError("disk tier: injected")

    second.cache.worker._tiers["disk"].get = stuck
    started = time.monotonic()
    request = second.arrive(prompt(18, 3 * PAGE + 5))
    second.wait(request)
    assert 0.4 < time.monotonic() - started < 5
    assert request.hits == []
    go.append(True)
    second.check_idle()


def test_the_tokens_decide_and_so_do_model_salt_and_adapter(start: Start, disk: Path) -> None:
    one = start(disk__path=str(disk))
    tokens = prompt(19, 3 * PAGE + 5)
    one.serve(tokens, [3, 9, 4])
    one.settle()
    assert one.arrive(tokens, rid="salt", cache_salt="s").hits == []
    assert one.arrive(tokens, rid="adapter", extra_key="lora").hits == []
    assert one.arrive([tokens[0] + 1, *tokens[1:]], rid="token").hits == []
    other = start(disk__path=str(disk), model="two")
    request = other.arrive(tokens)
    other.wait(request)
    assert request.hits == []


@pytest.mark.service
def test_instances_share_through_redis_and_a_dead_redis_breaks_no_promise(start: Start, tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        one, two = start(redis__url=server.url), start(redis__url=server.url)
        one.fill([3, 9, 4], seed=22)
        one.serve(prompt(22, 3 * PAGE + 5), [3, 9, 4])
        one.settle()
        request = two.arrive(prompt(22, 3 * PAGE + 5))
        two.wait(request)
        assert request.hits == [1, 2, 3]
        server.kill()
        assert two.load(request, [20, 21, 22])
        assert equal(two.read([20, 21, 22]), one.read([3, 9, 4]))
        later = two.arrive(prompt(23, 3 * PAGE + 5))
        two.wait(later)
        assert later.hits == []


@pytest.mark.service
def test_vllm_on_the_same_redis_is_another_world(start: Start, tmp_path: Path) -> None:
    """Same model, dtype, page and tokens: the engines' pages differ inside, so their chunks must never meet."""
    with redis_server(tmp_path) as server, server.client() as client:
        engine = start(redis__url=server.url)
        tokens = prompt(25, 3 * PAGE + 5)
        ours = engine.cache.scheduler.namespace
        theirs = replace(ours, engine="vllm")
        config = engine.cache.scheduler.config
        tier = RedisTier(config.redis, TierScope(theirs.label(), 0, ours.layout, CHUNK_BYTES))
        for key in KeyChain(root(theirs), PAGE).extend(tokens):
            tier.put(key, memoryview(bytes(CHUNK_BYTES)))
        tier.close()
        before = set(client.keys())
        assert len(before) == 3
        request = engine.arrive(tokens)
        engine.wait(request)
        assert request.hits == []
        engine.leave()
        assert engine.offload(request, [3, 9, 4])
        engine.settle()
        after = set(client.keys())
        assert before < after and len(after) == 6


def test_weights_that_are_updated_in_place_have_another_name(start: Start, disk: Path) -> None:
    """As update_weights_from_disk, _tensor, _distributed and _ipc do it: the files, if there are any, stay as they are."""
    first, second = start(disk__path=str(disk)), start(disk__path=str(disk))
    model = first.cache.scheduler.namespace.model
    assert second.cache.scheduler.namespace.model == model
    assert not first.linker._weights.changed()
    for engine in (first, second):
        engine.runner.model.bias.data[0] += 1.0
        assert engine.linker._weights.changed()
        assert not engine.linker._weights.changed()
    assert first.linker._weights.model == second.linker._weights.model != model


def test_a_flush_after_an_update_of_weights_finds_nothing_of_before(start: Start, disk: Path) -> None:
    """A flush without an update keeps everything, in every tier."""
    engine = start(disk__path=str(disk))

    def serve(rid: str) -> list[int]:
        request = engine.arrive(prompt(41, 3 * PAGE + 5), rid=rid)
        engine.wait(request)
        hits = list(request.hits)
        engine.leave()
        if not hits:
            assert engine.offload(request, [3, 9, 4])
            engine.settle()
        return hits

    assert serve("first") == []
    engine.linker.reset()
    assert serve("flushed") == [1, 2, 3]
    waiting = engine.arrive(prompt(41, 3 * PAGE + 5), rid="waits for its batch")
    assert waiting.hits == [1, 2, 3]
    engine.runner.model.bias.data[0] += 1.0
    engine.linker.reset()
    engine.leave()
    assert engine.cache.scheduler.directory.num_pins == 0
    assert serve("updated") == []
    assert serve("again") == [1, 2, 3]
    other = start(disk__path=str(disk))  # with the weights of before
    request = other.arrive(prompt(41, 3 * PAGE + 5))
    other.wait(request)
    assert request.hits == [1, 2, 3]


def test_an_engine_whose_weights_cannot_be_found_shares_with_no_other_start(start: Start, disk: Path) -> None:
    first, second = (start(disk__path=str(disk), runner=False) for _ in range(2))
    assert first.cache.scheduler.namespace.model != second.cache.scheduler.namespace.model


def test_options_that_decide_kv_are_in_the_name(start: Start, disk: Path, tmp_path: Path) -> None:
    """Each of them finds nothing of the others', and all of its own. Of the file with KV scales the content counts."""
    scales = tmp_path / "scales.json"
    ways: list[dict[str, object]] = [
        {},
        {"json_model_override_args": '{"rope_theta": 5e5}'},
        {"quantization": "fp8"},
        {"load_format": "dummy"},
        {"load_format": "dummy", "random_seed": 1},
        {"quantization_param_path": str(scales)},
    ]
    scales.write_text("1")
    for hits in (0, 2):
        for number, way in enumerate(ways):
            engine = start(disk__path=str(disk), arguments=way)
            request = engine.arrive(prompt(40, 2 * PAGE + 5))
            engine.wait(request)
            assert len(request.hits) == hits, way
            engine.leave()
            engine.fill([3, 9], seed=number)
            assert engine.offload(request, [3, 9])
            engine.settle()
    scales.write_text("2")
    engine = start(disk__path=str(disk), arguments=ways[-1])
    assert engine.arrive(prompt(40, 2 * PAGE + 5)).hits == []


def test_longrope_is_refused_because_a_batch_decides_it(start: Start, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"rope_scaling": {"type": "longrope"}}')
    with pytest.raises(ConfigError, match="LongRoPE"):
        start(arguments={"model_path": str(tmp_path)})
    with pytest.raises(ConfigError, match="LongRoPE"):
        start(arguments={"json_model_override_args": '{"rope_parameters": {"rope_type": "longrope"}}'})
