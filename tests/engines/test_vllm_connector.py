"""The connector's scheduler half under vLLM's own objects, step by step, for what an engine does only now and then or not on a CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.distributed.kv_events import BlockRemoved, BlockStored
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.outputs import KVConnectorOutput

from lmc.cache.connectors.vllm.connector import LmcConnector, _recoverable
from lmc.cache.connectors.vllm.groups import KVGroups
from lmc.cache.connectors.vllm.identity import request_identity
from lmc.cache.connectors.vllm.messages import StepPlan, StepReport
from lmc.cache.connectors.vllm.worker import WorkerSide
from lmc.cache.keys import KeyChain, root
from lmc.cache.parts import Group
from lmc.cache.plan import Plan
from lmc.cache.settings import load_settings
from lmc.cache.tiers.format import stored_bytes
from tests.engines.scenario import prompt
from tests.engines.scheduler_side import DrivenSide

BLOCK, CHUNK = 16, 64
TWO_GROUPS = KVGroups((1, 0), (Group("full", BLOCK), Group("window", BLOCK, CHUNK)), ((), ()))


def side(**values: Any) -> DrivenSide:
    return DrivenSide(BLOCK, **{"slots": 32, "chunk_tokens": CHUNK, **values})


def image(name: str, offset: int, length: int) -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(
        data=None, modality="image", identifier=name, mm_position=PlaceholderRange(offset=offset, length=length)
    )


# What a chunk's name depends on


def test_an_image_changes_the_names_of_its_chunks_and_of_all_that_follow() -> None:
    driven = side()
    tokens = prompt(1, 300)  # placeholders at 70..200, in the second to fourth chunk

    def names(*features: MultiModalFeatureSpec) -> list[bytes]:
        request = driven.request(tokens, mm_features=list(features))
        identity = request_identity(request, "")
        start = root(driven.namespace, lora=identity.lora, tenant=identity.tenant, salt=identity.salt)
        return list(KeyChain(start, CHUNK, identity.extra).extend(tokens))

    cat, dog = names(image("cat", 70, 130)), names(image("dog", 70, 130))
    assert cat[0] == dog[0] and all(one != other for one, other in zip(cat[1:], dog[1:], strict=True))
    assert names(image("cat", 70, 130)) == cat
    assert names(image("cat", 71, 130))[1:] != cat[1:]
    both, swapped = (
        names(image("cat", 70, 20), image("dog", 140, 20)),
        names(image("dog", 70, 20), image("cat", 140, 20)),
    )
    assert both[0] == swapped[0] and both[1] != swapped[1] and both[2] != swapped[2]
    late = names(image("cat", 260, 30))
    assert late[:4] == names(image("dog", 260, 30))[:4]  # an image behind the last full chunk is in no name


def test_requests_with_different_images_load_nothing_of_each_other() -> None:
    driven = side()
    tokens = prompt(2, 300)
    assert driven.serve(driven.request(tokens, mm_features=[image("cat", 70, 130)])) == 0
    assert driven.serve(driven.request(tokens, mm_features=[image("dog", 70, 130)])) == CHUNK
    assert driven.serve(driven.request(tokens, mm_features=[image("cat", 70, 130)])) == 4 * CHUNK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_of_a_prompt_are_in_its_names(dtype: torch.dtype) -> None:
    driven = side()
    one = torch.randn(300, 8).to(dtype)
    other = one.clone()
    other[150] += 1
    assert driven.serve(driven.request(None, prompt_embeds=one)) == 0
    assert driven.serve(driven.request(None, prompt_embeds=other)) == 2 * CHUNK
    assert driven.serve(driven.request(None, prompt_embeds=one)) == 4 * CHUNK
    assert driven.serve(driven.request([0] * 300)) == 0


# What is computed and whose ids are known (test_vllm_ahead.py has the engine itself plan ahead)


def test_a_step_that_is_planned_ahead_stores_only_what_is_computed() -> None:
    driven = side(store_decode=True)
    request = driven.request(prompt(3, 100))
    driven.side.lookup(request, 0)
    driven.side.admit(request, (driven.blocks,), 0)
    first = driven.side.plan(driven.output({request.request_id: 100}))
    request.num_computed_tokens = 100
    for ahead in range(40):  # tokens in flight: counted as computed, but their ids are not known
        plan = driven.side.plan(driven.output({request.request_id: 1}))
        request.num_computed_tokens += 1
        assert plan.stores == [], f"{ahead} tokens ahead"
    request.append_output_token_ids(list(range(30)))
    second = driven.side.plan(driven.output({request.request_id: 1}))
    assert [[chunk.blocks for chunk in one.chunks] for one in second.stores] == [[(5, 6, 7, 8)]]
    for plan in (first, second):
        driven.report(plan)
    driven.side.finish(request)
    assert driven.scheduler.directory.num_open == 0


def test_drafts_of_speculative_decoding_are_not_stored() -> None:
    driven = side(store_decode=True)
    request = driven.request(prompt(6, 60))
    driven.admit(request)
    request.append_output_token_ids([1, 2])
    request.num_computed_tokens = 61
    assert (
        driven.side.plan(driven.output({request.request_id: 1 + 4})).stores == []
    )  # 66 tokens, of which 4 are guesses
    request.append_output_token_ids([3, 4, 5])
    request.num_computed_tokens = 64
    plan = driven.side.plan(driven.output({request.request_id: 1 + 4}))
    assert [[chunk.blocks for chunk in one.chunks] for one in plan.stores] == [[(1, 2, 3, 4)]]
    driven.report(plan)
    driven.side.finish(request)


def test_nothing_is_stored_from_a_block_that_the_request_does_not_hold() -> None:
    driven = side()
    driven.blocks[5] = 0  # vLLM's sign for one that was dropped or never filled, here in the second chunk
    request = driven.request(prompt(7, 300))
    driven.side.lookup(request, 0)
    driven.side.admit(request, (driven.blocks,), 0)
    plan = driven.side.plan(driven.output({request.request_id: 300}))
    assert [[chunk.blocks for chunk in one.chunks] for one in plan.stores] == [[(1, 2, 3, 4)]]
    driven.report(plan)
    driven.side.finish(request)


@pytest.mark.parametrize(
    ("ahead", "second_runner", "shares_blocks", "is_hybrid", "tokens"),
    [
        (False, False, False, False, 4096),
        (True, False, False, False, 1),
        (False, True, False, False, 1),
        (False, False, True, False, 1),
        (False, False, False, True, 1),
        (True, True, True, True, 1),
    ],
)
def test_loads_run_before_the_pass_only_where_vllm_can_recompute_one_that_fails(
    caplog: pytest.LogCaptureFixture,
    ahead: bool,
    second_runner: bool,
    shares_blocks: bool,
    is_hybrid: bool,
    tokens: int,
) -> None:
    caplog.set_level("INFO", "lmc")
    config = load_settings(flags={"background_load_tokens": 4096}).config
    vllm_config: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(async_scheduling=ahead),
        use_v2_model_runner=second_runner,
        cache_config=SimpleNamespace(enable_prefix_caching=shares_blocks),
    )
    assert _recoverable(config, vllm_config, is_hybrid=is_hybrid).background_load_tokens == tokens
    assert ("every load runs in the background" in caplog.text) == (tokens == 1), (
        "a setting that is not used is said to be"
    )


# Faults in lmc end the cache, not vLLM


@pytest.mark.parametrize("where", ["lookup", "load", "store", "complete", "reset", "take_tickets"])
def test_a_fault_in_any_hook_ends_the_cache_and_every_promise_is_taken_back(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driven = side(background_load_tokens=1)
    tokens = prompt(4, 300)
    driven.serve(driven.request(tokens))

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("injected")

    monkeypatch.setattr(driven.scheduler.directory, where, broken)
    connector: Any = LmcConnector.__new__(LmcConnector)  # its constructor wants a whole configuration of vLLM
    connector._side = driven.side
    request = driven.request(tokens)
    found, background = connector.get_num_new_matched_tokens(request, 0)
    assert found is not None and background == (found > 0)
    blocks = SimpleNamespace(get_block_ids=lambda: (driven.blocks,))
    connector.update_state_after_alloc(request, blocks, found)
    connector.get_external_cache_hit_sources(request, found)
    request.num_computed_tokens = found
    step = connector.build_connector_meta(driven.output({request.request_id: 300 - found}))
    plan = step.plan
    planned = {block for one in plan.background_loads for chunk in one.chunks for block in chunk.blocks}
    assert planned | set(plan.failed_blocks) == set(driven.blocks[: found // BLOCK])
    assert plan.failed_requests == ([request.request_id] if plan.failed_blocks else [])
    answer = KVConnectorOutput(kv_connector_worker_meta=StepReport(driven.report_of(plan)))
    connector.update_connector_output(answer)
    assert connector.reset_cache()
    assert connector.request_finished_all_groups(request, ()) == (False, None)
    assert driven.side.scheduler is None
    assert connector.get_num_new_matched_tokens(driven.request(tokens), 0) == (0, False)
    step = connector.build_connector_meta(driven.output({}))
    assert not step.plan and step.refused
    assert connector.get_kv_connector_stats() is None and list(connector.take_events()) == []
    assert not connector.has_pending_push_work()


@pytest.mark.parametrize("where", ["lookup", "readable", "load", "store", "complete"])
def test_with_several_groups_a_fault_takes_back_requests_and_no_blocks(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM ends when it is told of blocks then."""
    driven = side(background_load_tokens=1, groups=TWO_GROUPS)
    tokens = prompt(4, 300)
    driven.serve(driven.request(tokens))

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("injected")

    monkeypatch.setattr(driven.scheduler.directory, where, broken)
    connector: Any = LmcConnector.__new__(LmcConnector)  # as above
    connector._side = driven.side
    request = driven.request(tokens)
    found, background = connector.get_num_new_matched_tokens(request, 0)
    assert found is not None and background == (found > 0)
    connector.update_state_after_alloc(request, SimpleNamespace(get_block_ids=lambda: driven.tables), found)
    request.num_computed_tokens = found
    plan = connector.build_connector_meta(driven.output({request.request_id: 300 - found})).plan
    assert plan.failed_blocks == []
    planned = [one.request_id for one in plan.background_loads]
    assert [*planned, *plan.failed_requests] == ([request.request_id] if found else [])
    answer = KVConnectorOutput(kv_connector_worker_meta=StepReport(driven.report_of(plan)))
    connector.update_connector_output(answer)
    assert driven.side.scheduler is None
    assert connector.get_num_new_matched_tokens(driven.request(tokens), 0) == (0, False)


def test_a_worker_of_several_groups_without_a_cache_gives_requests_back_and_no_blocks() -> None:
    groups = SimpleNamespace(kv_cache_groups=[None, None])
    worker = WorkerSide(load_settings(flags={}).config, None, groups)  # type: ignore[arg-type]  # not looked at
    worker.begin(StepPlan(Plan(failed_requests=["r"])), None)  # type: ignore[arg-type]
    connector: Any = LmcConnector.__new__(LmcConnector)
    connector._side = worker
    results = connector.get_transfer_results(set())
    assert (results.finished_recving, results.failed_recving) == ({"r"}, {"r"})
    assert connector.get_block_ids_with_load_errors() == set()
    assert connector.get_transfer_results(set()).failed_recving == set()


def test_the_spine_is_the_group_that_keeps_all_tokens_wherever_vllm_has_it() -> None:
    driven = side(groups=TWO_GROUPS)
    tokens = prompt(4, 2 * CHUNK + 5)
    driven.serve(driven.request(tokens))
    (store,) = driven.plans[0].stores
    per_chunk = CHUNK // BLOCK
    window, full = driven.tables
    assert [(chunk.group, chunk.blocks) for chunk in store.chunks] == [
        (0, tuple(full[:per_chunk])),
        (0, tuple(full[per_chunk : 2 * per_chunk])),
        (1, tuple(window[per_chunk : 2 * per_chunk])),
    ]
    assert driven.serve(driven.request(tokens)) == 2 * CHUNK
    window[2 * per_chunk - 1] = 0  # vLLM's sign for a block that is not there
    driven.admit(request := driven.request(prompt(5, 2 * CHUNK + 5)))
    assert [chunk.group for one in driven.plans[-1].stores for chunk in one.chunks] == [0, 0]
    driven.side.finish(request)
    driven.drain()
    assert driven.scheduler.directory.num_open == 0


# KV events


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5), st.sampled_from(["serve", "serve", "reset"])), max_size=30)
)
@settings(deadline=None, max_examples=50)
def test_events_replayed_give_what_the_tiers_hold(steps: list[tuple[int, int, str]]) -> None:
    driven = side(slots=6, announces=True, stored={"disk": {}}, **{"disk.capacity": 9 * stored_bytes(4096)})
    held: dict[str, dict[bytes, BlockStored]] = {"CPU": {}, "STORAGE": {}}
    for number, chunks, what in steps:
        if what == "reset":
            driven.side.reset()
        else:
            driven.serve(driven.request([number, *prompt(5, chunks * CHUNK)]))
        driven.drain()
        for event in driven.side.take_events():
            assert event.medium is not None
            place = held[event.medium]
            for one in event.block_hashes:
                if isinstance(event, BlockStored):
                    assert one not in place
                    place[one] = event
                else:
                    assert isinstance(event, BlockRemoved)
                    del place[one]
        used = {tier: chunks for tier, (chunks, _) in driven.scheduler.directory.usage().items()}
        assert len(held["CPU"]) == used["host"] * CHUNK // BLOCK
        assert len(held["STORAGE"]) == used.get("disk", 0) * CHUNK // BLOCK
    assert driven.side.events is not None
    assert len(driven.side.events._chunks) <= 6 + 9
