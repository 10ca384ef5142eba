"""SGLang's engines on a node: the linker alone, and two real servers that share what one has stored and outlive the node."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cache.node.attached import Process
from tests.engines.scenario import prompt
from tests.engines.sglang_pool import CHUNK_BYTES, PAGE, Engine, Start, equal, transfer
from tests.engines.sglang_server import SglangServer
from tests.engines.test_sglang import assert_same
from tests.services import wait_until

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.fault, pytest.mark.timeout(1800)]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Process]:
    node = Process(tmp_path / "node.sock", f"chunk_tokens: {PAGE}", "host:", "  capacity: 4MiB")
    yield node
    node.kill()


def attach(start: Start, node: Process) -> Engine:
    return start(node=str(node.path), node_deadline=20.0)


def settle(engine: Engine) -> None:
    """Nothing is under way or remembered; the engine has no directory that could be looked into."""
    engine.leave()
    engine.settle()
    assert (engine.linker._prompts, engine.cache.scheduler._requests, engine.linker._queued) == ({}, {}, {})
    assert engine.cache.worker._guard._kept == 0


def test_what_one_engine_stored_is_a_hit_in_the_other(start: Start, node: Process) -> None:
    one, other = attach(start, node), attach(start, node)
    one.fill([3, 9, 4], seed=1)
    one.serve(prompt(1, 3 * PAGE + 5), [3, 9, 4])
    request = other.arrive(prompt(1, 3 * PAGE + 5))
    assert request.hits == [1, 2, 3]
    assert other.load(request, [20, 7, 11])
    assert equal(other.read([20, 7, 11]), one.read([3, 9, 4]))
    longer = other.arrive(prompt(1, 5 * PAGE + 5), rid="longer", device_pages=3)
    assert longer.hits == []
    assert other.offload(longer, [30, 31], first=3), "it continues what the node holds"
    assert one.arrive(prompt(1, 5 * PAGE + 5), rid="back").hits == [1, 2, 3, 4, 5]
    for engine in (one, other):
        settle(engine)


def test_unknown_pages_before_an_offer_do_not_hold_it_back(start: Start, node: Process) -> None:
    engine = attach(start, node)
    request = engine.arrive(prompt(2, 4 * PAGE + 5))
    assert engine.offload(request, [4, 5], first=2)
    assert engine.arrive(prompt(2, 4 * PAGE + 5), rid="again", device_pages=2).hits == []
    assert engine.offload(request, [3, 9])
    assert engine.arrive(prompt(2, 4 * PAGE + 5), rid="third").hits == [1, 2, 3, 4]
    settle(engine)


def test_a_load_that_is_queued_when_the_node_is_killed_arrives(start: Start, node: Process) -> None:
    """SGLang aborts a request whose load fails once its batch has begun; the bytes are still there, so it need not fail."""
    engine = attach(start, node)
    engine.fill([3, 9, 4], seed=3)
    engine.serve(prompt(3, 3 * PAGE + 5), [3, 9, 4])
    request = engine.arrive(prompt(3, 3 * PAGE + 5), rid="again")
    assert engine.linker.load("again", [transfer(request.tail, [20, 7, 11])])
    node.kill()
    wait_until(lambda: engine.cache.worker._memory == "", "the worker has not noticed")
    index = engine.linker.start_layer_wise_loading()
    assert engine.linker.finish_layer_wise_loading(index)
    assert equal(engine.read([20, 7, 11]), engine.read([3, 9, 4]))
    wait_until(lambda: engine.cache.worker._node_slab.num_slots == 0, "the memory stays mapped")
    assert not engine.linker.offload([transfer(request.hashes, [3, 9, 4])]), "SGLang offers it again"
    again = engine.arrive(prompt(3, 3 * PAGE + 5), rid="third")
    assert again.hits == []
    settle(engine)


def test_a_cancelled_load_leaves_the_memory_free(start: Start, node: Process) -> None:
    engine = attach(start, node)
    engine.serve(prompt(4, 3 * PAGE + 5), [3, 9, 4])
    request = engine.arrive(prompt(4, 3 * PAGE + 5), rid="again")
    assert engine.linker.load("again", [transfer(request.tail, [20, 7, 11])])
    assert engine.linker.cancel_queued_load("again")
    request = engine.arrive(prompt(4, 3 * PAGE + 5), rid="third")
    assert engine.linker.load("third", [transfer(request.tail, [20, 7, 11])])
    engine.linker.reset()
    settle(engine)
    slots = 4 * 1024 * 1024 // (4096 * -(-CHUNK_BYTES // 4096))
    for seed in range(100, 100 + slots):  # a slot that was still in use would make one of these find no room
        assert engine.offload(engine.arrive(prompt(seed, PAGE + 1)), [50])
        engine.leave()


def test_a_load_that_the_node_does_not_order_is_computed(start: Start, node: Process) -> None:
    engine = attach(start, node)
    engine.serve(prompt(5, 3 * PAGE + 5), [3, 9, 4])
    request = engine.arrive(prompt(5, 3 * PAGE + 5), rid="again")
    node.kill()
    assert not engine.linker.load("again", [transfer(request.tail, [20, 7, 11])])
    assert engine.linker.start_layer_wise_loading() == -1
    settle(engine)


def test_two_servers_share_a_node_and_outlive_it(tiny_llama: Path, tmp_path: Path) -> None:
    lines = ("chunk_tokens: 64", "host:", "  capacity: 64MiB")
    node = Process(tmp_path / "node.sock", *lines)
    settings: dict[str, object] = {"node": str(tmp_path / "node.sock"), "node_deadline": 20.0}

    def start_one(name: str) -> SglangServer:
        return SglangServer(tiny_llama, tmp_path / name, settings=settings)

    with ThreadPoolExecutor(2) as starts:
        one, other = starts.map(start_one, ("one", "other"))
    with one, other:
        texts = [prompt(60 + index, 400) for index in range(3)]
        computed = [one.generate(text) for text in texts]
        assert [(answer["device"], answer["loaded"]) for answer in computed] == [(0, 0)] * 3
        one.settle()
        for text, wanted in zip(texts, computed, strict=True):
            answer = other.generate(text)
            assert (answer["device"], answer["loaded"]) == (0, 384), "what one engine stored is a hit in the other"
            assert_same(answer, wanted)
        node.kill()
        for server in (one, other):
            server.flush()
            for text, wanted in zip(texts, computed, strict=True):
                assert_same(server.generate(text), wanted)
        node = Process(tmp_path / "node.sock", *lines)
        loaded = 0
        for index in range(100):  # until both have attached again
            text = prompt(200 + index, 400)
            wanted = one.generate(text)
            one.settle()
            answer = other.generate(text)
            assert_same(answer, wanted)
            loaded = answer["loaded"]
            if loaded:
                break
            time.sleep(0.1)
        assert loaded == 384
    code, errors = node.stop()
    assert code == 0, errors
