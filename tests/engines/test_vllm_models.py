"""Other models than a dense Llama on the real engine: images in the prompt, KV heads that ranks share, MLA.

The test without the mark compat: on a CPU vLLM 0.30 itself loses the only image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmc.cache.tiers.format import FOOTER_BYTES
from tests import services
from tests.engines.scenario import assert_same, driver, kv_bytes_per_token, prompt
from tests.engines.tiny_model import (
    IMAGE_TOKEN,
    make_tiny_deepseek,
    make_tiny_idefics,
    make_tiny_llama,
)

pytestmark = pytest.mark.engine

PAST_LMC = {"kv_transfer_params": {"lmc": {"bypass": True}}}


def test_an_image_is_part_of_the_prompt(tmp_path: Path) -> None:
    """The same tokens around another image share what comes before it, and nothing behind."""

    def words(seed: int, length: int) -> list[int]:
        return [word % 500 for word in prompt(seed, length)]

    text = [*words(1, 70), IMAGE_TOKEN, *words(2, 100)]  # the image begins in the second chunk and ends in the third
    with driver(make_tiny_idefics(tmp_path / "model"), options={"skip_tokenizer_init": False}) as engine:
        cat, dog = (engine.generate([text], images=[[image]], extra_args=PAST_LMC) for image in (1, 2))
        assert cat[0]["logprobs"] != dog[0]["logprobs"]  # they do change the output
        for image, reference, cached in ((1, cat, 0), (2, dog, 64), (1, cat, 192), (2, dog, 192)):
            got = engine.generate([text], images=[[image]])
            assert got[0]["cached"] == cached
            assert_same(got, reference)
        both = engine.generate([text, text], images=[[2], [1]])  # in one batch
        assert [one["cached"] for one in both] == [192, 192]
        assert_same(both, [*dog, *cat])
        two = [*text[:100], IMAGE_TOKEN, *text[100:]]  # the second begins in the third chunk
        references = [engine.generate([two], images=[pair], extra_args=PAST_LMC) for pair in ([1, 2], [2, 1])]
        for pair, reference in zip(([1, 2], [2, 1]), references, strict=True):
            got = engine.generate([two], images=[pair])
            assert got[0]["cached"] == 128
            assert_same(got, reference)


@pytest.mark.compat
@pytest.mark.service
def test_of_ranks_that_hold_the_same_kv_head_one_stores_all_load_and_they_fail_together(tmp_path: Path) -> None:
    """KV in host memory, on disk and in Redis takes half of the bytes that two copies would take."""
    model, disk = make_tiny_llama(tmp_path / "model", kv_heads=1), tmp_path / "disk"
    text, other = prompt(40, 500), prompt(41, 500)
    chunk_bytes = 64 * kv_bytes_per_token(model)
    settings: dict[str, Any] = {"disk.path": str(disk), "host.capacity": 8 * chunk_bytes}
    with services.redis_server(tmp_path) as server:
        settings["redis.url"] = server.url
        with driver(model, options={"tensor_parallel_size": 2}, **settings) as engine:
            assert engine.call("namespace")["tp_size"] == 1
            reference = engine.generate([text], extra_args=PAST_LMC)
            for cached, tier in ((0, None), (448, "host"), (448, "disk")):
                if tier == "disk":
                    engine.generate([other])  # takes nearly all of the host
                engine.call("settle")
                got = engine.generate([text])
                assert got[0]["cached"] == cached
                assert_same(got, reference)
                assert tier is None or engine.call("metric", name="lmc_hit_tokens_total", labels={"tier": tier}) > 0
            for rank in (0, 1):
                engine.call("fail_next_load", rank=rank)
                assert_same(engine.generate([text]), reference)  # computed by both
                assert engine.call("metric", name="lmc_failures_total", labels={"operation": "load"}) > rank
                engine.call("settle")
                got = engine.generate([text])
                assert got[0]["cached"] == 448
                assert_same(got, reference)
            engine.call("settle")
            assert engine.call("usage")["host"][1] == 8
        stored = [disk_files(disk, rank) for rank in (0, 1)]
        assert [len(one) for one in stored] == [14, 0]
        assert all(len(payload) == chunk_bytes for payload in stored[0].values())
        assert server.client().dbsize() == 14
        with driver(model, options={"tensor_parallel_size": 2}, **{**settings, "disk.path": None}) as engine:
            got = engine.generate([text])
            assert got[0]["cached"] == 448
            assert_same(got, reference)
            assert engine.call("metric", name="lmc_hit_tokens_total", labels={"tier": "redis"}) == 448


def disk_files(disk: Path, rank: int) -> dict[str, bytes]:
    """The chunks of a rank, without their footers."""
    return {file.name: file.read_bytes()[:-FOOTER_BYTES] for file in disk.glob(f"v*/*/r{rank}/??/*")}


@pytest.mark.compat
def test_mla_on_a_cpu_that_forgets_prefixes_is_refused_and_the_engine_runs(tmp_path: Path) -> None:
    """vLLM's own kernel for CPUs without AMX computes the rest of a prompt as if nothing came before it."""
    text, own_block = prompt(51, 300), {"chunk_tokens": None, "options": {"block_size": None}}
    with driver(make_tiny_deepseek(tmp_path / "model"), strict=False, **own_block) as engine:
        first, again = engine.generate([text]), engine.generate([text])
        assert_same(again, first)
        if engine.call("has_amx"):
            assert again[0]["cached"] > 0
        else:
            assert [first[0]["cached"], again[0]["cached"]] == [0, 0]
            assert any("cannot go on from a prefix" in line for line in engine.log)
