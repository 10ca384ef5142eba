"""Nodes in this process and in one of their own, and engines without an engine that attach to them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lmc.cache.config import CacheConfig
from lmc.cache.keys import Namespace
from lmc.cache.node.memory import Memory
from lmc.cache.node.open import open_worker
from lmc.cache.node.scheduler import NodeScheduler
from lmc.cache.node.server import Node
from lmc.cache.node.start import memory_bytes
from lmc.cache.worker.worker import CacheWorker
from tests.cache.instance import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    CHUNK_TOKENS,
    NUM_BLOCKS,
    NUM_LAYERS,
    Instance,
    _layout,
    settings,
)
from tests.services import wait_until

MEMORY = "4MiB"


def attached_settings(path: Path, **values: object) -> CacheConfig:
    """A loaded machine must not turn a hit into a miss, unless a test is about that."""
    return settings(**{"node": str(path), "node_deadline": 20.0, **values})


@dataclass
class Attached(Instance):
    """An Instance whose cache is a node's. Two of them in one process are two engines for the node."""

    def __post_init__(self) -> None:
        self.kv = [np.zeros((NUM_LAYERS, NUM_BLOCKS, BLOCK_BYTES), dtype=np.uint8) for _ in range(self.num_ranks)]
        self.workers: list[CacheWorker] = []
        for rank, blocks in enumerate(self.kv):
            layout = _layout(blocks)
            namespace = Namespace("test", self.model, "", "u8", layout.fingerprint, CHUNK_TOKENS, self.num_ranks)
            self.workers.append(open_worker(self.config, namespace, layout, rank=rank, num_ranks=self.num_ranks))
        self.node = NodeScheduler(self.config, [worker.ready() for worker in self.workers], BLOCK_TOKENS)
        self.scheduler = self.node  # type: ignore[assignment]

    def pump(self) -> None:
        """All of a plan: loads that a finished request left behind end, too."""
        self.node.apply(self._reports())
        plan = self.node.take_plan()
        for worker in self.workers:
            worker.begin(plan)
            worker.end(plan)

    def _reports(self):
        report = self.workers[0].take_report()
        for worker in self.workers[1:]:
            report = report.merge(worker.take_report())
        return report

    def settle(self) -> None:
        wait_until(self._is_settled, "copies never ended")

    def _is_settled(self) -> bool:
        self.pump()
        return not self.node.busy

    def wait_attached(self) -> None:
        def attached() -> bool:
            self.pump()
            return self.node._link.ready

        wait_until(attached, "the engine never attached")


@dataclass
class Here:
    """A node on a thread of this process, whose directories can be looked into while it is asked nothing."""

    node: Node
    thread: threading.Thread
    path: Path
    engines: list[Attached] = field(default_factory=list)

    def engine(self, num_ranks: int = 1, model: str = "test", **values: object) -> Attached:
        engine = Attached(attached_settings(self.path, **values), num_ranks, model=model)
        self.engines.append(engine)
        return engine

    def check(self) -> None:
        """Every directory is sound, and nothing is left of what has ended."""
        checked: Future[None] = Future()

        def look() -> None:
            try:
                for domain in self.node.domains.values():
                    domain.directory.check()
            except AssertionError as error:
                checked.set_exception(error)
            else:
                checked.set_result(None)

        self.node.mail.append(look)
        self.node.wake()
        checked.result(60)

    @property
    def num_open(self) -> int:
        return sum(domain.directory.num_open for domain in self.node.domains.values())

    @property
    def num_pins(self) -> int:
        return sum(domain.directory.num_pins for domain in self.node.domains.values())

    def wait_idle(self) -> None:
        """Until nothing is under way, nor follows from what engines have sent: the node reads that before it looks twice."""
        for _ in range(2):
            wait_until(self._is_idle, "copies or pins are left")
            self.check()
        wait_until(self._is_idle, "copies or pins are left")

    def _is_idle(self) -> bool:
        for engine in self.engines:
            if engine.node._link.waiting:  # an engine steps as long as its cache is busy, and the node hears of it then
                engine.pump()
        return self.num_open == 0 and self.num_pins == 0


@contextmanager
def node_here(path: Path, **values: object) -> Iterator[Here]:
    config = settings(**{"host_capacity": MEMORY, **values})
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(64)
    node = Node(config, listener, Memory(memory_bytes(config)))
    here = Here(node, threading.Thread(target=node.run), path)
    here.thread.start()
    try:
        yield here
    finally:
        for engine in here.engines:
            engine.close()
        node.stop()
        here.thread.join(20)
        node.close(5.0)
        listener.close()


class Process:
    """`lmc node` as it is started by a user."""

    def __init__(self, path: Path, *lines: str, wait: bool = True) -> None:
        file = path.with_suffix(".yaml")
        file.write_text("\n".join(lines) or f"chunk_tokens: {CHUNK_TOKENS}\nhost:\n  capacity: {MEMORY}\n")
        environment = {key: value for key, value in os.environ.items() if not key.startswith("LMC_NODE")}
        self.path = path
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lmc", "node", "--config", str(file), "--socket", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self.process.stdout is not None
        self.ready = self.process.stdout.readline() if wait else ""

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> tuple[int, str]:
        """The exit code and what it wrote to standard error."""
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors

    def engine(self, **values: object) -> Attached:
        return Attached(attached_settings(self.path, **values))
