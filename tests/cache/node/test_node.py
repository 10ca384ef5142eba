"""Engines on one node: what one stored is a hit for the others, and bytes are right whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from lmc.cache.tiers.format import stored_bytes
from tests import services
from tests.cache import instance
from tests.cache.instance import CHUNK_TOKENS, Identity, chunk_files, prompt, serve_side_by_side
from tests.cache.node import attached
from tests.cache.node.attached import Here, node_here
from tests.services import wait_until


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Here]:
    with node_here(tmp_path / "node.sock") as node:
        yield node


def test_what_one_engine_stored_is_a_host_hit_in_the_other(here: Here) -> None:
    one, other = here.engine(), here.engine()
    tokens = prompt(1, 50)
    assert one.serve(tokens).loaded == 0
    served = other.serve(tokens)
    assert (served.loaded, served.sources) == (48, {"host": 48})
    assert other.metric("hit_tokens_total", tier="host") == 48
    here.wait_idle()
    (domain,) = here.node.domains.values()
    assert domain.directory.usage()["host"][0] == 6


def test_the_same_prefix_is_stored_once(here: Here) -> None:
    """Both compute it before either has stored it."""
    one, other = here.engine(), here.engine()
    tokens = prompt(1, 50)
    blocks = list(range(13))
    orders = []
    for engine in (one, other):
        assert engine.node.lookup("r", tokens, 0, Identity()) == 0
        engine.node.admit("r", 0, blocks)
        engine.node.store("r", tokens, 50, 50, blocks)
        orders.append(engine.node.take_plan())
    assert [len(plan.stores) for plan in orders] == [1, 0]
    one.workers[0].begin(orders[0])
    one.workers[0].end(orders[0])
    for engine in (one, other):
        engine.node.finish("r")
        engine.settle()
    here.wait_idle()
    (domain,) = here.node.domains.values()
    assert domain.directory.usage()["host"][0] == 6


def test_engines_of_other_models_share_memory_but_no_chunk(here: Here) -> None:
    one, other = here.engine(model="a"), here.engine(model="b")
    tokens = prompt(1, 50)
    one.serve(tokens)
    assert other.serve(tokens).loaded == 0
    assert one.serve(tokens).loaded == other.serve(tokens).loaded == 48
    assert len(here.node.domains) == 2
    here.wait_idle()


def test_chunks_of_different_sizes_share_one_memory(here: Here) -> None:
    one, both = here.engine(), here.engine(num_ranks=2)
    for number in range(20):
        for engine in (one, both):
            engine.serve(prompt(number, 60))
            assert engine.serve(prompt(number, 60)).loaded == 56
    here.wait_idle()
    strides = {domain.places.stride for domain in here.node.domains.values()}
    assert strides == {4096, 8192}


def test_engines_side_by_side_get_right_bytes_while_chunks_are_evicted(tmp_path: Path) -> None:
    with node_here(tmp_path / "node.sock", host_capacity="128KiB") as here:
        pair = [here.engine(), here.engine()]
        serve_side_by_side(pair, 40)
        here.wait_idle()
        (domain,) = here.node.domains.values()
        assert domain.directory.counts.evicted["host"] > 0
        assert sum(engine.metric("hit_tokens_total", tier="host") for engine in pair) > 0


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_node_writes_to_disk_and_stages_from_it(tmp_path: Path, num_ranks: int) -> None:
    patient = {"load_deadline": 60.0}  # a loaded machine must not turn a hit into a miss
    with node_here(tmp_path / "node.sock", host_capacity="128KiB", disk_path=tmp_path / "disk", **patient) as here:
        engine = here.engine(num_ranks, **patient)
        for number in range(12):
            engine.serve(prompt(number, 60))
            here.wait_idle()  # else writes are dropped, so that they do not hold all slots
        sources: dict[str, int] = {}
        for number in range(12):
            served = engine.serve(prompt(number, 60))
            assert served.loaded == 56
            for tier, tokens in served.sources.items():
                sources[tier] = sources.get(tier, 0) + tokens
        assert sources["disk"] > 0
    with node_here(tmp_path / "second.sock", host_capacity="128KiB", disk_path=tmp_path / "disk", **patient) as here:
        engine = here.engine(num_ranks, **patient)
        assert engine.serve(prompt(3, 60)).sources == {"disk": 56}, "a node that starts finds its disk warm"


@pytest.mark.service
def test_nodes_share_through_mooncake_without_a_copy(tmp_path: Path) -> None:
    with services.mooncake_store(tmp_path) as store:
        pool = {"mooncake_master": store.address, "mooncake_metadata": store.metadata, "mooncake_timeout": 20}
        patient = {"lookup_deadline": 15, "load_deadline": 15, "mooncake_hostname": services.LOCAL}
        with (
            node_here(tmp_path / "one.sock", **pool, **patient) as one,
            node_here(tmp_path / "two.sock", **pool, **patient) as two,
        ):
            first, second = one.engine(2), two.engine(2)
            second.serve(prompt(99, 60))  # its namespace takes memory
            for number in range(4):
                first.serve(prompt(number, 60))
                one.wait_idle()
                two.wait_idle()  # chunks that are being written hold its few slots
                assert second.serve(prompt(number, 60)).sources == {"mooncake": 56}
            (domain,) = two.node.domains.values()
            with domain._tiers[0]["mooncake"]._tier._client.connected() as process:
                slot = domain._copiers[0]._slab.view(0)
                assert process.region(slot) is not None, "the client knows the node's memory"


def test_a_node_compresses_what_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine says what its KV consists of. Bytes of four values stand for KV that gets shorter."""
    plain, random_bytes = attached._layout, instance.right_bytes
    of_bf16, block_bytes = frozenset({"bfloat16"}), 8192
    for module in (attached, instance):
        monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(attached, "_layout", lambda blocks: replace(plain(blocks), dtypes=of_bf16))
    monkeypatch.setattr(instance, "right_bytes", lambda *values: random_bytes(*values) % 4)
    disk = {"disk_path": tmp_path / "disk", "disk_compress": "lossless-max", "strict": True}
    with node_here(tmp_path / "node.sock", host_capacity="1MiB", **disk) as here:
        engine = here.engine()
        for number in range(4):
            engine.serve(prompt(number, 60))
            here.wait_idle()
        files = chunk_files(tmp_path / "disk")
        assert files
        chunk_bytes = instance.NUM_LAYERS * block_bytes * CHUNK_TOKENS // instance.BLOCK_TOKENS
        assert max(file.stat().st_size for file in files) < 0.8 * stored_bytes(chunk_bytes)
    with node_here(tmp_path / "second.sock", **disk) as here:
        assert here.engine().serve(prompt(3, 60)).sources == {"disk": 56}


def test_tenants_and_adapters_stay_apart(here: Here) -> None:
    one, other = here.engine(), here.engine()
    tokens = prompt(1, 50)
    one.serve(tokens, Identity(tenant="a"))
    assert other.serve(tokens, Identity(tenant="b")).miss == "never stored"
    assert other.serve(tokens, Identity(lora="x", tenant="a")).loaded == 0
    assert other.serve(tokens, Identity(tenant="a")).loaded == 48


def test_a_reset_of_one_engine_leaves_the_others_their_chunks(here: Here) -> None:
    one, other = here.engine(), here.engine()
    tokens = prompt(1, 50)
    one.serve(tokens)
    one.node.reset()
    assert one.serve(tokens).loaded == 0
    assert one.serve(tokens).loaded == 48
    assert other.serve(tokens).loaded == 48
    here.wait_idle()


def test_a_hit_stays_while_others_store(tmp_path: Path) -> None:
    """Between the answer and the load, other engines want all of the memory."""
    with node_here(tmp_path / "node.sock", host_capacity="128KiB") as here:
        one, other = here.engine(), here.engine()
        tokens = prompt(1, 50)
        one.serve(tokens)
        assert one.node.lookup("r", tokens, 0, Identity()) == 48
        for number in range(10, 30):
            other.serve(prompt(number, 100))
        blocks = list(range(20, 33))
        one.node.admit("r", 48, blocks)
        plan = one.node.take_plan()
        assert len((plan.loads or plan.background_loads)[0].chunks) == 48 // CHUNK_TOKENS
        for number in range(30, 40):
            other.serve(prompt(number, 100))  # the slots are not anybody's while they are read
        one.workers[0].begin(plan)
        assert not one.workers[0].take_failed_blocks()
        one.node.finish("r")
        one.settle()
        here.wait_idle()


def test_what_a_client_pins_stays_within_its_share_of_the_memory(tmp_path: Path) -> None:
    """A share is of all that the namespace could have, whatever it has taken of the memory when it is opened."""
    with node_here(tmp_path / "node.sock", host_capacity="128KiB", clients_pin_share="25%") as here:
        engine = here.engine()
        kept = prompt(1, 50)
        engine.serve(kept)
        assert engine.node.lookup("pinned", kept, 0, Identity()) == 48
        engine.node.finish("pinned", 600.0)
        for number in range(10, 30):
            engine.serve(prompt(number, 60))
        (domain,) = here.node.domains.values()
        assert domain.directory.counts.evicted["host"] > 0
        assert engine.serve(kept).loaded == 48
        assert domain.metrics.registry.get_sample_value("lmc_pins_cut_total", {"limit": "clients.pin_share"}) is None


def test_many_threads_of_engines(here: Here) -> None:
    engines = [here.engine() for _ in range(4)]

    def work(seed: int) -> None:
        for turn in range(15):
            engines[seed].serve(prompt((turn * (seed + 1)) % 5, 30 + turn))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    here.wait_idle()


def test_a_namespace_that_comes_late_gets_its_part_of_the_memory(tmp_path: Path) -> None:
    """The first has taken all. Both then serve on, with right bytes, while memory moves from one to the other."""
    with node_here(tmp_path / "node.sock", host_capacity="512KiB") as here:
        one, late = here.engine(model="a"), here.engine(num_ranks=2, model="b")
        for number in range(30):
            one.serve(prompt(number, 60))
        assert here.node.free_bytes == 0
        first, second = here.node.domains.values()
        assert late.serve(prompt(1, 60)).loaded == 0

        def both_have_their_part() -> bool:
            for number in range(10):
                one.serve(prompt(number, 60))
                late.serve(prompt(number, 60))
            return first.places.num_extents == second.places.num_extents == 4

        wait_until(both_have_their_part, "memory was not shared out")
        here.wait_idle()
        late.serve(prompt(1, 60))
        assert late.serve(prompt(1, 60)).loaded == 56
        late.close()
        here.engines.remove(late)

        def lent_again() -> bool:
            for number in range(30):
                one.serve(prompt(number, 60))
            return first.places.num_extents == 8

        wait_until(lent_again, "what nobody uses was not lent")
        here.wait_idle()
