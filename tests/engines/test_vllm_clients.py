"""vLLM's own request objects with whatever clients may put into them, from the first lookup to the end. No engine."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.request import Request

from lmc.cache.observe.logs import Sparingly
from tests.cache.connectors.odd_inputs import LONG_TEXT, PARAMETERS, QUICK, is_short_and_clean, logged
from tests.engines.scenario import prompt
from tests.engines.scheduler_side import DrivenSide

pytestmark = pytest.mark.compat

BLOCK, CHUNK = 16, 64
TEXT = prompt(1, 3 * CHUNK + 5)
ALLOWED = {"clients.tenant": True, "clients.pin": True, "admin.token": "open sesame"}


def side(**values: Any) -> DrivenSide:
    driven = DrivenSide(BLOCK, **{"slots": 64, "chunk_tokens": CHUNK, **values})
    driven.side.edge._sparingly = Sparingly(seconds=0)
    return driven


def sent(parameters: Any, request_id: str = "r", salt: Any = None, tokens: list[int] = TEXT) -> Request:
    request = Request(request_id, tokens, SamplingParams(max_tokens=4), None, cache_salt=salt)
    request.kv_transfer_params = parameters  # vLLM takes it as it is from kv_transfer_params, or from vllm_xargs
    return request


def lives(driven: DrivenSide, request: Request) -> tuple[int, dict[str, Any] | None]:
    """Tokens that were loaded, and the answer to the client."""
    found = driven.admit(request)
    answer = driven.side.finish(request)
    driven.drain()
    driven.plans.clear()
    return found, answer


SIDES = [side(), side(**ALLOWED)]


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), phases=QUICK)
@given(st.lists(st.tuples(PARAMETERS, LONG_TEXT, st.none() | LONG_TEXT), min_size=20, max_size=20), st.integers(0, 1))
def test_whatever_clients_send_the_cache_goes_on(inputs: list[tuple[Any, str, Any]], which: int) -> None:
    """5,000 requests. At worst one is computed without the cache, and a line says so."""
    driven = SIDES[which]
    for parameters, request_id, salt in inputs:
        with logged() as lines:
            lives(driven, sent(parameters, request_id, salt))
        assert driven.side.scheduler is not None, lines
        assert len(lines) <= 1 and all(map(is_short_and_clean, lines))
    assert driven.side.tracked == {} and driven.scheduler._requests == {}
    lives(driven, sent(None))
    assert lives(driven, sent(None)) == (3 * CHUNK, None)
    limits = driven.scheduler.config.clients
    pins = driven.scheduler.directory.pins()
    assert len(pins) <= (limits.pins if which else 0)
    assert sum(chunks for chunks, _ in pins.values()) <= 64 // 10
    series = sum(len(family.samples) for family in driven.scheduler.metrics.registry.collect())
    assert series < 250, "labels of a client's choosing"


def test_names_of_2_mb_stay_no_longer_than_their_requests() -> None:
    driven = side(**ALLOWED)
    spans = driven.scheduler._accounting.spans
    tracemalloc.start()
    for number in range(120):
        if number == 20:
            before, _ = tracemalloc.get_traced_memory()
        long = f"{number} " * 400_000
        wishes = {"tenant": f"{number} {'t' * 200}", "pin_seconds": 60}
        lives(driven, sent({"lmc": wishes}, long, long))
        lives(driven, sent({"lmc": {"tenant": long, long: 1}}, long))
    del long
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 2 << 20, "100 requests of several MB each"
    assert len(json.dumps(spans.read())) < 120 * 500


def test_a_client_does_not_learn_what_others_with_another_salt_have_sent() -> None:
    driven = side(**ALLOWED)
    lives(driven, sent(None, "theirs", "their salt"))
    explain = {"explain": True}
    for wishes in (explain, {**explain, "token": "guess"}, {**explain, "tenant": "B", "pin_seconds": 1}):
        assert lives(driven, sent({"lmc": wishes}, f"{wishes}", "my salt 1"))[1] is None
    _, answer = lives(driven, sent({"lmc": {**explain, "token": "open sesame"}}, "operator", "my salt 2"))
    assert answer is not None and answer["lmc"]["miss"] == "salt differs"


def test_a_client_that_names_a_tenant_does_not_get_its_chunks() -> None:
    victim, attacker = {"lmc": {"tenant": "B", "token": "open sesame"}}, {"lmc": {"tenant": "B"}}
    driven = side(**{"admin.token": "open sesame"})
    lives(driven, sent(victim))
    assert lives(driven, sent(attacker)) == (0, None)
    assert lives(driven, sent(None)) == (0, None)
    assert lives(driven, sent(victim))[0] == 3 * CHUNK


def test_a_client_pins_within_limits_if_at_all() -> None:
    pin = {"lmc": {"pin_seconds": 10**9}}
    driven = side()
    lives(driven, sent(pin))
    assert driven.scheduler.directory.num_pins == 0
    driven = side(**{"clients.pin": True, "clients.pins": 3, "clients.pin_share": "25%", "clients.pin_seconds": 60})
    for number in range(10):
        lives(driven, sent(pin, f"r{number}", tokens=prompt(number, 7 * CHUNK + 1)))
    pins = driven.scheduler.directory.pins()
    assert {owner: chunks for owner, (chunks, _) in pins.items()} == {"asked r0": 7, "asked r1": 7, "asked r2": 2}
    assert all(expires <= driven.scheduler._clock() + 60 for _, expires in pins.values())


def test_salts_do_not_multiply_a_tenants_quota() -> None:
    """Another tenant's chunk stays, whatever salts this one makes up."""
    driven = side(slots=16, **ALLOWED, tenant_quota="50%")
    other = {"lmc": {"tenant": "other"}}
    lives(driven, sent(other))
    for number in range(30):
        lives(driven, sent({"lmc": {"tenant": "loud"}}, f"r{number}", f"salt {number}"))
    assert lives(driven, sent(other))[0] == 3 * CHUNK
    assert driven.scheduler.directory.usage()["host"][0] <= 8 + 3
