"""A model with three kinds of KV, without an engine: scheduler and worker move parts of all groups, and every loaded byte is the right one.

The engine's tables are made as vLLM makes them: blocks of all groups lie in one pool and overlay each other, a window's blocks go when a
step begins behind it, and a block that is free is soon another request's.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from lmc.cache.keys import Namespace
from lmc.cache.parts import Group, Parts, Step, leaf_key
from lmc.cache.plan import SKIP, Plan, Report
from lmc.cache.scheduler.cache import CacheScheduler, Identity
from lmc.cache.tiers.format import FOOTER_BYTES, decode
from lmc.cache.transfer.layout import KVLayout, Layer, Piece, Region
from lmc.cache.transfer.pinned import Slab
from lmc.cache.worker.open import open_worker
from tests.cache.instance import settings

CHUNK = 8
WINDOWS = (Group("full", 2), Group("window", 4, 17), Group("local", 2, 16), Group("window", 8, 5))
STATES = (Group("full", 2), Group("state", 8), Group("state", 8), Group("window", 4, 9))
PARTS = Parts(CHUNK, WINDOWS)
SIZES = (96, 160, 64, 200)  # bytes of a block
NUM_BLOCKS, PAGE = 200, 256
POISON = 0xEE


class Engine:
    def __init__(
        self, host: int, disk: Path | None = None, groups: tuple[Group, ...] = WINDOWS, **values: object
    ) -> None:
        self.groups, self.parts = groups, Parts(CHUNK, groups)
        self.pool = np.full((NUM_BLOCKS, PAGE), POISON, dtype=np.uint8)
        layouts = []
        for group, size in zip(self.groups, SIZES, strict=True):
            region = Region(self.pool.ctypes.data, PAGE, size)
            layer = Layer((f"layer of {size}",), (Piece(0, 0, size),))
            layouts.append(KVLayout("test", "cpu", group.block_tokens, NUM_BLOCKS, (region,), (layer,), f"{group}"))
        config = settings(
            chunk_tokens=CHUNK,
            host_capacity=host,
            background_load_tokens=1,
            checkpoint_tokens=24,
            load_deadline=20,
            **({"disk_path": disk} if disk else {}),
            **values,
        )
        namespace = Namespace("test", "model", "", "u8", "layouts of all groups", CHUNK)
        others = list(zip(layouts[1:], self.parts.blocks[1:], strict=True))
        self.worker = open_worker(config, namespace, layouts[0], rank=0, num_ranks=1, others=others)
        self.scheduler = CacheScheduler(config, [self.worker.ready()], self.groups[0].block_tokens, groups=self.groups)
        self.free = list(range(1, NUM_BLOCKS))
        self.serial = self.loaded = 0

    def right(self, group: int, tokens: Sequence[int], block: int) -> np.ndarray:
        seed = f"{group}/{list(tokens[: (block + 1) * self.groups[group].block_tokens])}".encode()
        return np.frombuffer(hashlib.shake_128(seed).digest(SIZES[group]), dtype=np.uint8)

    def take(self, generator: random.Random) -> int:
        return self.free.pop(generator.randrange(len(self.free)))

    def give(self, block: int) -> None:
        self.pool[block] = POISON
        self.free.append(block)

    def serve(self, tokens: list[int], generator: random.Random, *, fails: bool = False) -> int:
        """A request in steps of random length; returns the tokens that were loaded."""
        self.serial += 1
        name, found = f"r{self.serial}", None
        until = time.monotonic() + 30
        while found is None:
            found = self.scheduler.lookup(name, tokens, 0, Identity())
            self.pump()
            assert time.monotonic() < until
        tables: list[list[int]] = [[] for _ in self.groups]
        for number, group in enumerate(self.groups):
            start = group.first_needed(found) // group.block_tokens
            tables[number] = [0] * start + [self.take(generator) for _ in range(found // group.block_tokens - start)]
        self.scheduler.admit(name, found, *self.seen(tables))
        if fails:
            self.break_next_load()
        self.step(self.scheduler.take_plan())
        if found:
            while name not in (loaded := self.worker.take_loaded()):
                assert not loaded and time.monotonic() < until
            if self.worker.take_failed_requests():
                found = self.begin_again(tables)
            self.worker.take_failed_blocks()
        self.pump()
        for number, group in enumerate(self.groups):
            for index in range(group.first_needed(found) // group.block_tokens, found // group.block_tokens):
                block = tables[number][index]
                right = self.right(number, tokens, index)
                assert (self.pool[block][: SIZES[number]] == right).all(), f"wrong bytes in group {number}"
        self.compute(name, tokens, found, tables, generator)
        self.scheduler.finish(name)
        for table in tables:
            for block in table:
                if block:
                    self.give(block)
        self.pump()
        self.loaded += found
        return found

    def begin_again(self, tables: list[list[int]]) -> int:
        """As vLLM does after a failed load."""
        for table in tables:
            for block in table:
                if block:
                    self.give(block)
            table.clear()
        return 0

    def compute(
        self, name: str, tokens: list[int], done: int, tables: list[list[int]], generator: random.Random
    ) -> None:
        while done < len(tokens):
            before, done = done, min(len(tokens), done + generator.randrange(1, 40))
            if self.parts.has_states and before < len(tokens) - 1:
                done = aligned(before, done, len(tokens))
            for number, group in enumerate(self.groups):
                table, size = tables[number], group.block_tokens
                if group.kind == "state":
                    self.advance_state(number, tokens, before, done, table, generator)
                    continue
                for index in range(min(first_kept(group, before) // size, len(table))):
                    if table[index]:
                        self.give(table[index])
                        table[index] = 0
                while len(table) * size < done:
                    table.append(self.take(generator))
                for index in range(before // size, done // size):
                    self.pool[table[index]][: SIZES[number]] = self.right(number, tokens, index)
            if self.scheduler.wants_store(name, done, len(tokens)):
                blocks, others = self.seen(tables)
                states = [end // CHUNK for end in (before, done) if end and end % CHUNK == 0]
                self.scheduler.store(name, tokens, done, len(tokens), blocks, others, Step(before, states))
            self.step(self.scheduler.take_plan())
            self.pump()

    def advance_state(
        self, number: int, tokens: list[int], before: int, done: int, table: list[int], generator: random.Random
    ) -> None:
        """The state before the step stays in its block; that behind it is in the block of the last token."""
        size = self.groups[number].block_tokens
        for index in range((before - 1) // size):
            if table[index]:
                self.give(table[index])
                table[index] = 0
        table += [0] * ((done - 1) // size - len(table))
        if len(table) == (done - 1) // size:
            table.append(self.take(generator))
        self.pool[table[-1]] = POISON  # of a token inside the block
        if done % size == 0:
            self.pool[table[-1]][: SIZES[number]] = self.right(number, tokens, done // size - 1)

    def seen(self, tables: list[list[int]]) -> tuple[list[int], list[list[int]]]:
        return tables[0], [[block or SKIP for block in table] for table in tables[1:]]

    def step(self, plan: Plan) -> None:
        self.worker.begin(plan)
        self.worker.end(plan)

    def pump(self) -> None:
        self.step(self.scheduler.take_plan())
        report: Report = self.worker.take_report()
        if report:
            self.scheduler.apply(report)

    def settle(self) -> None:
        until = time.monotonic() + 30
        while self.scheduler.busy:
            self.pump()
            assert time.monotonic() < until
        self.scheduler.directory.check()

    def break_next_load(self) -> None:
        copier = self.worker.copier
        execute = copier.backend.execute

        def broken(*_: object) -> None:
            copier.backend.execute = execute  # type: ignore[method-assign]
            raise OSError("injected")

        copier.backend.execute = broken  # type: ignore[method-assign]

    def close(self) -> None:
        self.settle()
        self.scheduler.close()
        self.worker.close()


def aligned(before: int, done: int, num_tokens: int) -> int:
    """Where a step ends that vLLM cuts so that it leaves states at ends of blocks, and at the last one of a prompt."""
    last = (num_tokens - 1) // CHUNK * CHUNK
    if before < last < done:
        return last
    return max(done // CHUNK * CHUNK, before + 1) if done < num_tokens and before % CHUNK == 0 else done


def first_kept(group: Group, num_tokens: int) -> int:
    """The first token that a request may still attend to which has computed so many."""
    if group.kind == "window":
        return max(0, num_tokens - group.span + 1)
    return num_tokens // group.span * group.span if group.kind == "local" else 0


def prompts(seed: int, count: int) -> Iterator[list[int]]:
    """Continuations of each other, and of starts of each other."""
    generator = random.Random(seed)
    known: list[list[int]] = [[]]
    for _ in range(count):
        start = generator.choice(known[-12:])
        text = start[: generator.randrange(len(start) + 1)] if generator.random() < 0.6 else start
        text = [*text, *(generator.randrange(100) for _ in range(generator.randrange(1, 60)))][:150]
        known.append(text)
        yield text


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("groups", [WINDOWS, STATES], ids=["windows", "states"])
def test_every_loaded_byte_is_right(tmp_path: Path, tier: str, groups: tuple[Group, ...], seed: int) -> None:
    engine = Engine(24 * 4096, tmp_path if tier == "disk" else None, groups, write="through" if seed % 2 else "back")
    generator = random.Random(seed)
    for text in prompts(seed, 60):
        engine.serve(text, generator, fails=generator.random() < 0.1)
    assert engine.loaded > 500
    engine.close()


def test_parts_are_persisted_at_their_own_length_and_found_after_a_restart(tmp_path: Path) -> None:
    generator, text = random.Random(1), list(range(83))
    first = Engine(64 * 4096, tmp_path)
    assert first.serve(text, generator) == 0
    assert first.serve(text, generator) == 80
    first.close()
    sizes: dict[int, set[int]] = {}
    for file in tmp_path.glob("v*/*/r0/??/*"):
        content = file.read_bytes()
        footer = decode(content[-FOOTER_BYTES:])
        groups = [number for number in (1, 2, 3) if footer.parent and footer.key == leaf_key(footer.parent, number)]
        sizes.setdefault(groups[0] if groups else 0, set()).add(len(content) - FOOTER_BYTES)
        assert bytes([POISON]) * 40 not in content, "bytes of something else"
    assert sizes == {group: {PARTS.blocks[group] * SIZES[group]} for group in range(4)}
    second = Engine(64 * 4096, tmp_path)
    assert second.serve(text, generator) == 80
    second.close()


def test_two_groups_never_name_one_block() -> None:
    engine = Engine(64 * 4096)
    text = list(range(41))
    engine.serve(text, random.Random(1))
    assert engine.scheduler.lookup("r", text, 0, Identity()) == 40
    tables = [[0] * (40 // group.block_tokens) for group in WINDOWS]
    numbers = iter(range(1, NUM_BLOCKS))
    for number, group in enumerate(WINDOWS):
        for index in range(group.first_needed(40) // group.block_tokens, len(tables[number])):
            tables[number][index] = next(numbers)
    tables[1][-1] = tables[0][0]
    engine.scheduler.admit("r", 40, *engine.seen(tables))
    engine.step(engine.scheduler.take_plan())
    until = time.monotonic() + 30
    while "r" not in engine.worker.take_loaded():
        assert time.monotonic() < until
    assert engine.worker.take_failed_requests() == {"r"}
    engine.scheduler.finish("r")
    engine.close()


def test_a_slab_has_slots_of_the_largest_part() -> None:
    engine = Engine(64 * 4096)
    slab = engine.worker._slab
    assert isinstance(slab, Slab)
    assert slab.slot_bytes == max(blocks * size for blocks, size in zip(PARTS.blocks, SIZES, strict=True))
    engine.close()
