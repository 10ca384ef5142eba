"""KV events of engines on a node: each announces what the node holds of the prompts that it knows, until the node has gone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from vllm.distributed.kv_events import BlockRemoved, BlockStored

import lmc.cache.node.wire as wire
from lmc.cache.node.channel import Channel, connect
from tests.cache.node.attached import Here, node_here
from tests.engines.scenario import prompt
from tests.engines.scheduler_side import DrivenSide
from tests.services import wait_until

pytestmark = pytest.mark.engine

BLOCK, CHUNK = 16, 64
SLOTS = 16


class Engine:
    """The scheduler's half, with a worker that copies nothing, and a router that listens to it."""

    def __init__(self, here: Here, number: int) -> None:
        self.worker: Channel = connect(str(here.path), 10.0, takes_descriptor=True)
        name = bytes([number]) * wire.ID_BYTES
        self.worker.ask(wire.TakeMemory(name, 0), 10.0)
        self.worker.put(wire.Taken())
        settings = {"node": str(here.path), "node_deadline": 20.0, "chunk_tokens": CHUNK}
        self.driven = DrivenSide(BLOCK, slots=SLOTS, announces=True, mapping=name.hex(), **settings)
        self.held: dict[bytes, BlockStored] = {}

    def serve(self, seed: int, chunks: int) -> int:
        found = self.driven.serve(self.driven.request([seed, *prompt(seed, chunks * CHUNK)]))
        self.listen()
        return found

    def listen(self) -> None:
        self.driven.step({})
        for event in self.driven.side.take_events():
            for one in event.block_hashes:
                if isinstance(event, BlockStored):
                    assert event.medium == "CPU" and one not in self.held
                    self.held[one] = event
                else:
                    assert isinstance(event, BlockRemoved)
                    del self.held[one]

    def close(self) -> None:
        self.driven.side.close()
        self.worker.close()


def test_each_engine_announces_what_the_node_holds(tmp_path: Path) -> None:
    chance = random.Random(1)
    with node_here(tmp_path / "node.sock", host_capacity=SLOTS * 4096, chunk_tokens=CHUNK) as here:
        engines = [Engine(here, 1), Engine(here, 2)]

        def agree() -> bool:
            for engine in engines:
                engine.listen()
            (domain,) = here.node.domains.values()
            in_node = domain.directory.usage()["host"][0] * CHUNK // BLOCK
            return set(engines[0].held) == set(engines[1].held) and len(engines[0].held) == in_node

        assert engines[0].serve(0, 3) == 0
        assert engines[1].serve(0, 3) > 0, "stored by the other engine, announced by this one too"
        wait_until(agree, "the engines announce different chunks")
        for _ in range(30):  # more than fits: chunks go again
            seed, chunks = chance.randrange(1, 8), chance.randrange(1, 5)
            for engine in engines:
                engine.serve(seed, chunks)
        wait_until(agree, "the engines announce other chunks than the node holds")
        for engine in engines:
            assert engine.driven.side.events is not None
            assert len(engine.driven.side.events._chunks) <= 2 * SLOTS
        engines[0].driven.side.reset()
        engines[0].listen()
        assert not engines[0].held, "they are not this engine's any more"
        engines[1].listen()
        assert engines[1].held
        engines[0].close()
    wait_until(lambda: engines[1].listen() or not engines[1].held, "chunks of a node that has gone are still announced")
    engines[1].close()


def test_an_engine_that_does_not_listen_hears_that_it_missed_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmc.cache.node.session.MOST_CHANGES", 5)
    monkeypatch.setattr("lmc.cache.node.server.TICK_SECONDS", 3600.0)
    with node_here(tmp_path / "node.sock", host_capacity=SLOTS * 4096, chunk_tokens=CHUNK) as here:
        one, other = Engine(here, 1), Engine(here, 2)
        one.serve(0, 3)
        one.serve(0, 3)  # without ticks, what has changed comes with the next answer
        assert len(one.held) == 3 * CHUNK // BLOCK
        for seed in range(1, 6):
            other.serve(seed, 2)
        one.serve(9, 1)
        assert len(one.held) <= CHUNK // BLOCK, "what it announced before may have gone"
        one.close()
        other.close()
