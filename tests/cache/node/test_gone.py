"""Engines and nodes that come and go: no wrong byte, nothing left behind, and whoever stays goes on."""

from __future__ import annotations

import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import lmc.cache.node.wire as wire
from lmc.cache.directory import Miss
from lmc.cache.node import slab
from lmc.cache.node.channel import Channel
from lmc.cache.node.memory import map_memory
from lmc.errors import NodeError
from tests.cache.instance import Identity, prompt
from tests.cache.node.attached import Here, Process, node_here
from tests.services import wait_until

ROOT = Path(__file__).parents[3]


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Here]:
    with node_here(tmp_path / "node.sock", host_capacity="256KiB") as node:
        yield node


class Client:
    """tests.cache.node.client in a process."""

    def __init__(self, path: Path, seed: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.cache.node.client", str(path), str(seed)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def served(self) -> str:
        """The next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("served"), "the client ended: it met a wrong byte, or a fault"
        return line

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


def begin_store(here: Here, name: str, seed: int) -> tuple[object, object]:
    """An engine that was given slots for a prompt and has not copied yet."""
    engine = here.engine()
    tokens = prompt(seed, 50)
    assert engine.node.lookup(name, tokens, 0, Identity()) == 0
    engine.node.admit(name, 0, list(range(13)))
    engine.node.store(name, tokens, 50, 50, list(range(13)))
    return engine, engine.node.take_plan()


@pytest.mark.fault
def test_an_engine_that_is_killed_leaves_nothing_behind(here: Here) -> None:
    stays = here.engine()
    chance = random.Random(3)
    for number in range(3):
        client = Client(here.path, number)
        for _ in range(chance.randrange(2, 30)):
            client.served()
        stays.serve(prompt(number, 60))
        client.kill()
        here.wait_idle()
        wait_until(lambda: len(here.node.sessions) == 1, "the session of the killed engine is left")
        for seed in range(12):
            stays.serve(prompt(seed, 60))
    here.wait_idle()


@pytest.mark.fault
def test_a_stopped_engine_blocks_nobody_and_loses_its_slots_only_when_it_has_died(here: Here) -> None:
    stays = here.engine()
    client = Client(here.path, 1)
    client.served()
    client.process.send_signal(signal.SIGSTOP)
    for seed in range(30):
        stays.serve(prompt(seed, 60))
    client.process.send_signal(signal.SIGCONT)
    for _ in range(5):
        client.served()
    client.process.send_signal(signal.SIGSTOP)
    client.kill()
    here.wait_idle()


def test_a_slot_is_not_given_out_again_while_the_worker_that_got_it_lives(here: Here) -> None:
    """The scheduler's half has gone, and a worker in the midst of a plan has not."""
    engine, plan = begin_store(here, "r", 1)
    session = next(iter(here.node.sessions.values()))
    engine.node.close()
    wait_until(lambda: session.ended, "the node has not noticed")
    (domain,) = here.node.domains.values()
    slots = {chunk.slot for copies in plan.stores for chunk in copies.chunks}
    assert domain.directory.num_open == len(slots) == 6
    other = here.engine()
    for number in range(20):
        other.serve(prompt(100 + number, 100))
        assert domain.directory.num_open >= 6
    engine.workers[0].begin(plan)
    engine.workers[0].end(plan)  # the late copy
    assert other.serve(prompt(1, 50)).loaded == 0, "what nobody has confirmed is not visible"
    engine.workers[0].close()
    here.engines.remove(engine)
    here.wait_idle()


def test_a_connection_that_breaks_is_made_anew_and_the_copies_of_before_are_settled(here: Here) -> None:
    engine, plan = begin_store(here, "r", 1)
    first = engine.node._link.session
    engine.node._link._channel.socket.shutdown(2)
    engine.wait_attached()
    assert engine.node._link.session not in (0, first)
    (domain,) = here.node.domains.values()
    assert domain.directory.num_open == 6, "the worker may be copying"
    engine.workers[0].begin(plan)
    engine.workers[0].end(plan)
    engine.node.finish("r")
    engine.settle()
    here.wait_idle()
    assert len(here.node.sessions) == 1
    tokens = prompt(1, 50)
    assert engine.serve(tokens).loaded == 0, "the store was reported to nobody, so it does not count"
    assert engine.serve(tokens).loaded == 48


def test_a_session_is_settled_although_the_connection_breaks_as_the_node_is_told(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, plan = begin_store(here, "r", 1)
    engine.node._link._channel.socket.shutdown(2)
    engine.wait_attached()
    put, failures = Channel.put, [NodeError("node: it has gone")]

    def fails_once(channel: Channel, message: wire.Message) -> None:
        if isinstance(message, wire.Batch) and failures and any(isinstance(one, wire.Quiet) for one in message.events):
            raise failures.pop()
        put(channel, message)

    monkeypatch.setattr(Channel, "put", fails_once)
    engine.workers[0].begin(plan)
    engine.workers[0].end(plan)
    engine.node.finish("r")
    engine.settle()
    assert not failures
    engine.wait_attached()
    here.wait_idle()
    wait_until(lambda: len(here.node.sessions) == 1, "the earlier session is left")


def test_what_was_promised_before_the_connection_broke_is_computed(here: Here) -> None:
    engine = here.engine()
    tokens = prompt(1, 50)
    engine.serve(tokens)
    assert engine.node.lookup("r", tokens, 0, Identity()) == 48
    engine.node._link._channel.socket.shutdown(2)
    engine.node.admit("r", 48, list(range(13)))
    plan = engine.node.take_plan()
    assert not plan.loads and plan.failed_blocks == list(range(12))
    engine.workers[0].begin(plan)
    assert engine.workers[0].take_failed_blocks() == set(range(12))
    engine.node.finish("r")
    engine.wait_attached()
    assert engine.serve(tokens).loaded == 48
    here.wait_idle()


@pytest.mark.fault
def test_engines_go_on_without_a_node_and_attach_to_the_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    node = Process(tmp_path / "node.sock")
    one, other = node.engine(), node.engine()
    tokens = prompt(1, 50)
    one.serve(tokens)
    assert other.serve(tokens).loaded == 48
    for number in range(3):
        node.kill()
        served = [one.serve(tokens), one.serve(tokens), other.serve(tokens)]
        assert [each.loaded for each in served] == [0, 0, 0]
        assert served[1].miss == Miss.NODE_AWAY
        node = Process(tmp_path / "node.sock")
        for engine in (one, other):
            engine.wait_attached()
        fresh = prompt(10 + number, 50)
        assert one.serve(fresh).loaded == 0
        assert other.serve(fresh).loaded == 48
    gone = [record for record in caplog.records if "the node has gone" in record.getMessage()]
    back = [record for record in caplog.records if "attached to the node at" in record.getMessage()]
    assert len(gone) == 2 * 3
    assert len(back) <= 2 * 4
    for engine in (one, other):
        engine.close()
    code, errors = node.stop()
    assert code == 0, errors


@pytest.mark.fault
def test_a_node_that_stands_still_costs_one_deadline_and_no_more(tmp_path: Path) -> None:
    node = Process(tmp_path / "node.sock")
    engine = node.engine(node_deadline=0.02)
    tokens = prompt(1, 50)
    wait_until(lambda: engine.serve(tokens).loaded == 48, "the node is too slow")
    before = engine.node._link.timeouts
    node.process.send_signal(signal.SIGSTOP)
    for _ in range(20):
        assert engine.serve(tokens, settle=False).miss == Miss.NODE_DEADLINE
    assert engine.node._link.timeouts == before + 1, "only the first one waited"
    node.process.send_signal(signal.SIGCONT)
    wait_until(lambda: engine.serve(tokens).loaded == 48, "the engine did not come back to the node")
    engine.close()
    assert node.stop()[0] == 0


def test_late_answers_are_given_back(here: Here) -> None:
    """The node answers after the deadline: what it has ordered is not done, and it hears of that."""
    engine = here.engine(node_deadline=0.0)
    deadline = time.monotonic() + 60
    for number in range(30):
        engine.serve(prompt(number % 5, 50), settle=False)
        assert time.monotonic() < deadline
    assert engine.node._link.timeouts > 0
    engine.settle()
    engine.wait_attached()
    here.wait_idle()


def test_a_worker_of_an_older_memory_copies_nothing(here: Here) -> None:
    engine, plan = begin_store(here, "r", 1)
    plan.memory = "another node"
    engine.workers[0].begin(plan)
    engine.workers[0].end(plan)
    report = engine.workers[0].take_report()
    assert set(report.failed.values()) == {"copy"} and len(report.failed) == 6
    engine.node.apply(report)
    engine.node.finish("r")
    here.wait_idle()
    assert engine.serve(prompt(1, 50)).loaded == 0


def test_a_worker_that_gives_up_lets_its_slots_go(here: Here) -> None:
    """As the connector does on a fault: it closes the copier first, then the worker. The process lives on."""
    engine, _ = begin_store(here, "r", 1)
    worker = engine.workers[0]
    worker.copier.close()
    worker.close(0.0)
    engine.node.close()
    here.engines.remove(engine)
    here.wait_idle()
    wait_until(lambda: not here.node.sessions, "the session of the engine is left")


def test_the_engine_goes_on_while_the_memory_is_unmapped(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, plan = begin_store(here, "r", 1)
    worker = engine.workers[0]
    unmap, entered, steps_done = worker._node_slab.unmap, threading.Event(), threading.Event()
    waited = []

    def slow() -> bool:
        entered.set()
        waited.append(steps_done.wait(20))
        return unmap()

    monkeypatch.setattr(worker._node_slab, "unmap", slow)
    os.write(worker._stop_write, b"x")  # as if the node had gone
    assert entered.wait(60)
    worker.begin(plan)
    worker.end(plan)
    steps_done.set()
    assert set(worker.take_report().failed.values()) == {"copy"}, "the plan is for a memory that is being unmapped"
    wait_until(lambda: bool(waited), "unmap never ended")
    assert waited == [True], "a step waited for unmap"
    engine.close()
    here.engines.remove(engine)
    here.wait_idle()


def test_a_worker_that_could_not_map_the_memory_tries_again(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [NodeError("node: no room for a mapping")] * 2

    def scarce(descriptor: int, size: int) -> mmap.mmap:
        if failures:
            raise failures.pop()
        return map_memory(descriptor, size)

    monkeypatch.setattr(slab, "map_memory", scarce)
    engine = here.engine()
    engine.wait_attached()
    assert not failures
    tokens = prompt(1, 50)
    engine.serve(tokens)
    assert engine.serve(tokens).loaded == 48


def test_a_memory_that_the_node_was_not_told_of_is_unmapped(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    put, map_slab, failures, still_mapped = Channel.put, slab.NodeSlab.map, [NodeError("node: it has gone")], []

    def fails_once(channel: Channel, message: wire.Message) -> None:
        if isinstance(message, wire.Taken) and failures:
            raise failures.pop()
        put(channel, message)

    def look(one: slab.NodeSlab, *values: int) -> None:
        still_mapped.append(one._mapping is not None)
        map_slab(one, *values)

    monkeypatch.setattr(Channel, "put", fails_once)
    monkeypatch.setattr(slab.NodeSlab, "map", look)
    here.engine().wait_attached()
    assert still_mapped == [False, False]


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"LMCNODE\x63", b"LMCNODE\x01\xff\xff\xff\xff", os.urandom(500)]
)
def test_strangers_at_the_socket_do_no_harm(here: Here, garbage: bytes) -> None:
    import socket

    engine = here.engine()
    for _ in range(3):
        stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stranger.connect(str(here.path))
        stranger.sendall(garbage)
        stranger.close()
    engine.serve(prompt(1, 50))
    assert engine.serve(prompt(1, 50)).loaded == 48
