"""A start that is refused leaves nothing behind, and what is measured at start is measured alone."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from collections.abc import Callable

import pytest

import lmc.cache.node.open as node_open
from lmc.cache.connectors.base import LocalCache
from lmc.cache.keys import Namespace
from lmc.cache.transfer import pinned
from lmc.cache.transfer.common_slots import CommonSlots, offer_slots
from lmc.cache.transfer.pinned import Slab
from lmc.cache.worker import open as open_module
from lmc.cache.worker.open import open_worker
from lmc.errors import ConfigError, LmcError, TransferError
from tests.cache.instance import CHUNK_TOKENS, Instance, settings


@pytest.fixture
def instance() -> Instance:
    """For its layout and its names."""
    instance = Instance(settings())
    instance.close()
    return instance


@pytest.fixture
def slabs(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Slab]]:
    """All that were opened. Their memory is touched without end, until they are closed."""
    monkeypatch.setattr(pinned, "touch", lambda address, size, closing: "" if closing.wait(60) else "too long")
    opened: list[weakref.ref[Slab]] = []
    original = open_module.open_slab

    def open_slab(*arguments: object) -> Slab:
        slab = original(*arguments)  # type: ignore[arg-type]
        opened.append(weakref.ref(slab))
        return slab

    monkeypatch.setattr(open_module, "open_slab", open_slab)
    return opened


def threads_of_lmc() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("lmc")}


def refuse(kind: type[Exception], text: str) -> Callable[..., object]:
    def refused(*_: object, **__: object) -> object:
        raise kind(text)  # a new one: its traceback holds what was opened

    return refused


CONFIG = settings(host_capacity=256 << 20)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda patch: patch.setattr(open_module, "choose_backend", refuse(TransferError, "no driver")),
        lambda patch: patch.setattr(open_module, "open_streams", refuse(TransferError, "no stream")),
        lambda patch: patch.setattr(open_module, "CacheWorker", refuse(ConfigError, "no worker")),
        lambda patch: patch.setattr(node_open, "CacheScheduler", refuse(ConfigError, "no scheduler")),
    ],
    ids=["backend", "streams", "worker", "scheduler"],
)
def test_a_refused_start_leaves_no_memory_and_no_thread(
    break_it: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
    instance: Instance,
    slabs: list[weakref.ref[Slab]],
) -> None:
    before = threads_of_lmc()
    break_it(monkeypatch)
    worker = instance.workers[0]
    layout = worker.copier.layout
    namespace = Namespace("test", "test", "", "u8", layout.fingerprint, CHUNK_TOKENS)
    with pytest.raises(LmcError, match="no "):
        LocalCache(CONFIG, namespace, layout)
    gc.collect()
    assert not threads_of_lmc() - before
    assert not [slab for slab in slabs if slab() is not None]


def test_devices_that_have_no_backend_are_refused_before_memory_is_mapped(
    monkeypatch: pytest.MonkeyPatch, instance: Instance
) -> None:
    monkeypatch.setattr(pinned.mmap, "mmap", refuse(AssertionError, "memory was mapped"))
    layout = instance.workers[0].copier.layout
    namespace = Namespace("test", "test", "", "u8", layout.fingerprint, CHUNK_TOKENS)
    with pytest.raises(ConfigError, match="no transfer backend for the device xpu:0"):
        open_worker(CONFIG, namespace, dataclasses.replace(layout, device="xpu:0"), rank=0, num_ranks=1)


def test_backends_are_measured_before_memory_is_touched(
    monkeypatch: pytest.MonkeyPatch, instance: Instance, slabs: list[weakref.ref[Slab]]
) -> None:
    original, seen = open_module.choose_backend, []

    def choose_backend(*arguments: object, **options: object) -> object:
        seen.append(len(slabs))
        return original(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(open_module, "choose_backend", choose_backend)
    layout = instance.workers[0].copier.layout
    namespace = Namespace("test", "test", "", "u8", layout.fingerprint, CHUNK_TOKENS)
    open_worker(CONFIG, namespace, layout, rank=0, num_ranks=1).close()
    assert (seen, len(slabs)) == ([0], 1)


@pytest.mark.parametrize("tier", ["disk", "redis", "s3", "mooncake"])
def test_parts_of_several_groups_are_not_compressed(
    instance: Instance, slabs: list[weakref.ref[Slab]], tier: str
) -> None:
    layout = instance.workers[0].copier.layout
    namespace = Namespace("test", "test", "", "u8", "of both groups", CHUNK_TOKENS)
    config = settings(**{f"{tier}_compress": "lossless"})
    with pytest.raises(
        ConfigError, match=f"^a model with several KV groups is not compressed yet; set {tier}.compress to none$"
    ):
        open_worker(config, namespace, layout, rank=0, num_ranks=1, others=[(layout, 1)])
    assert not slabs


def test_parts_of_several_groups_have_no_common_slots(instance: Instance, slabs: list[weakref.ref[Slab]]) -> None:
    layout = instance.workers[0].copier.layout
    namespace = Namespace("test", "test", "", "u8", "of both groups", CHUNK_TOKENS)
    offer = offer_slots(4, 4096)
    with (
        CommonSlots(0, True, offer.num_slots, offer.descriptor) as common,
        pytest.raises(ConfigError, match="ranks have no common slots yet for a model with several KV groups"),
    ):
        open_worker(CONFIG, namespace, layout, rank=0, num_ranks=1, common=common, others=[(layout, 1)])
    assert not slabs
