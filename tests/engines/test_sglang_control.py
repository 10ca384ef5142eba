"""What a client may ask of the cache for one request on SGLang, in sampling_params.custom_params."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmc.cache.observe.logs import Sparingly
from tests.cache.connectors.odd_inputs import LONG_TEXT, PARAMETERS, QUICK, is_short_and_clean, logged
from tests.engines.scenario import TOKEN, prompt
from tests.engines.sglang_pool import CHUNK_BYTES, PAGE, Engine, Request, Start

pytestmark = [pytest.mark.engine, pytest.mark.sglang]

PAGES = [3, 9, 4]


def ask(engine: Engine, tokens: list[int], rid: str, **wishes: object) -> Request:
    return engine.arrive(tokens, rid=rid, custom_params={"lmc": wishes, "thinking_budget": 9})


def test_a_request_may_bypass_the_cache(start: Start) -> None:
    engine = start()
    tokens = prompt(60, 3 * PAGE + 5)
    request = ask(engine, tokens, "first", bypass=True)
    engine.leave()
    assert not engine.offload(request, PAGES)
    engine.serve(tokens, PAGES)
    assert ask(engine, tokens, "second", bypass=True).hits == []
    assert engine.arrive(tokens, rid="third").hits == [1, 2, 3]
    engine.check_idle()


def test_a_request_may_load_and_not_store(start: Start) -> None:
    engine = start()
    tokens, longer = prompt(61, 2 * PAGE + 5), [*prompt(61, 2 * PAGE + 5)[: 2 * PAGE], *prompt(62, PAGE + 5)]
    engine.serve(tokens, PAGES[:2])
    request = ask(engine, longer, "longer", store=False)
    assert request.hits == [1, 2]
    assert engine.load(request, [20, 21])
    engine.leave()
    assert not engine.offload(request, [22], first=2)
    assert engine.arrive(longer, rid="again").hits == [1, 2]


def test_a_request_may_ask_why(start: Start) -> None:
    engine = start(admin__token=TOKEN)
    tokens = prompt(63, 3 * PAGE + 5)
    cold = ask(engine, tokens, "cold", explain=True, token=TOKEN)
    nothing = {"prompt_tokens": 53, "hit_tokens": {"device": 0}, "miss": "never stored"}
    assert cold.customized_info == {"lmc": [nothing]}
    engine.leave()
    assert engine.offload(cold, PAGES)
    warm = ask(engine, tokens, "warm", explain=True, pin_seconds=0, token=TOKEN)
    assert engine.load(warm, [20, 21, 22])
    assert warm.customized_info == {"lmc": [{**nothing, "hit_tokens": {"device": 0, "host": 48}, "miss": None}]}
    partly = ask(engine, tokens, "partly", explain=True, token=TOKEN)
    partly.device_pages = 1
    assert engine.load(partly, [23, 24])
    assert partly.customized_info == {"lmc": [{**nothing, "hit_tokens": {"device": 16, "host": 32}, "miss": None}]}
    assert engine.arrive(tokens, rid="silent").customized_info is None
    assert ask(engine, tokens, "not the operator", explain=True).customized_info is None


def test_pinned_chunks_stay_and_are_pinned_when_they_are_stored(start: Start) -> None:
    """SGLang says when a request leaves the queue, which is before its chunks are stored."""
    engine = start(host__capacity=8 * 4096 * -(-CHUNK_BYTES // 4096), clients__pin=True, clients__pin_share="50%")
    directory = engine.cache.scheduler.directory
    slots = directory.usage()["host"][1]
    tokens = prompt(64, 3 * PAGE + 5)
    request = ask(engine, tokens, "asked", pin_seconds=3600)
    engine.leave()
    assert engine.offload(request, PAGES)
    assert directory.pins()["asked asked"][0] == 3
    for seed in range(200, 200 + 2 * slots):
        engine.serve(prompt(seed, PAGE + 1), [50])
    assert engine.arrive(tokens, rid="later").hits == [1, 2, 3]
    engine.leave()
    directory.check()


def test_a_pin_ends(start: Start) -> None:
    engine = start(clients__pin=True)
    tokens = prompt(65, 3 * PAGE + 5)
    request = ask(engine, tokens, "asked", pin_seconds=0.001)
    engine.leave()
    assert engine.offload(request, PAGES)
    engine.settle()
    assert engine.cache.scheduler.client_pins.waiting == {}
    engine.check_idle()


@pytest.mark.parametrize("wishes", [{"tenant": "a"}, {"tenants": "a"}, {"bypass": "yes"}, {"pin_seconds": "long"}])
def test_unclear_wishes_bypass_the_cache_and_say_so(
    start: Start, wishes: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    """A tenant of lmc's would not be one of SGLang's own cache; its cache_salt is."""
    engine = start()
    tokens = prompt(66, 3 * PAGE + 5)
    engine.serve(tokens, PAGES)
    assert ask(engine, tokens, "unclear", **wishes).hits == []
    assert "request unclear bypasses the cache" in caplog.text


def test_whatever_clients_send_the_cache_goes_on(start: Start) -> None:
    """3,000 requests. At worst one is computed without the cache, and a line says so."""
    engine = start(admin__token=TOKEN, clients__pin=True)
    engine.linker._edge._sparingly = Sparingly(seconds=0)
    tokens = prompt(70, 3 * PAGE + 5)
    text = st.none() | LONG_TEXT

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), phases=QUICK)
    @given(st.lists(st.tuples(PARAMETERS, LONG_TEXT, text, text), min_size=20, max_size=20))
    def send(inputs: list[tuple[Any, str, Any, Any]]) -> None:
        for parameters, rid, salt, extra_key in inputs:
            with logged() as lines:
                engine.arrive(tokens, rid, custom_params=parameters, cache_salt=salt, extra_key=extra_key)
                engine.leave()
            assert engine.cache is not None, lines
            assert len(lines) <= 1 and all(map(is_short_and_clean, lines))
        engine.offload(engine.arrive(tokens, rid, custom_params=parameters), PAGES)
        engine.leave()

    send()
    engine.serve(tokens, PAGES)
    assert engine.arrive(tokens, rid="plain").hits == [1, 2, 3]
    engine.leave()
    assert engine.cache.scheduler.directory.num_pins <= 100


def test_prompts_share_a_name_exactly_if_the_model_gets_the_same(start: Start) -> None:
    """What else the model may get (images, embeddings, overridden positions) keeps a request out of the cache."""
    from lmc.cache.connectors.edge import Wishes
    from lmc.cache.connectors.sglang.prompts import Prompt
    from lmc.cache.keys import Namespace

    text = st.sampled_from([None, "", "a", "b", '["a", "b"]'])
    inputs = st.tuples(st.lists(st.integers(0, 1), min_size=4, max_size=9), text, text, st.sampled_from(["", "t", "u"]))
    namespace = Namespace("sglang", "model", "", "bf16", "layout", 4)

    @settings(max_examples=200, deadline=None)
    @given(inputs, inputs, st.integers(0, 3))
    def compare(one: tuple[Any, ...], other: tuple[Any, ...], field: int) -> None:
        for first, second in ((one, other), (one, (*one[:field], other[field], *one[field + 1 :]))):
            prompts = [
                Prompt(
                    Request("r", array("q", tokens), None, extra_key=key, cache_salt=salt), Wishes(), namespace, tenant
                )
                for tokens, key, salt, tenant in (first, second)
            ]
            beside = [(key or "", salt or "", tenant) for _, key, salt, tenant in (first, second)]
            for index, (name, same_place) in enumerate(zip(prompts[0].keys, prompts[1].keys, strict=False)):
                end = (index + 1) * 4
                equal_input = beside[0] == beside[1] and first[0][:end] == second[0][:end]
                assert (name == same_place) == equal_input

    compare()
