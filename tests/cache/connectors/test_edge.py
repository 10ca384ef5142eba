"""What clients send along with a request: which wishes are granted, and that nothing else comes of whatever they send."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmc.cache.config import CacheConfig
from lmc.cache.connectors.edge import MOST_TENANT, Edge, Wishes
from lmc.cache.keys import hashed_name
from lmc.cache.observe.logs import Sparingly
from lmc.cache.plan import request_name
from lmc.cache.settings import load_settings
from tests.cache.connectors.odd_inputs import LONG_TEXT, PARAMETERS, QUICK, is_short_and_clean, logged

NOTHING = Wishes()
BYPASS = Wishes(bypass=True)
ALL_ALLOWED = {"clients.tenant": True, "clients.pin": True}
TOKEN = {"admin.token": "open sesame"}


def configured(**flags: object) -> CacheConfig:
    return load_settings(None, {}, flags).config


def read(wishes: object, request_id: str = "r", **flags: object) -> Wishes:
    return talkative(Edge(configured(**flags), "kv_transfer_params")).read({"lmc": wishes}, request_id)


def talkative(edge: Edge) -> Edge:
    """It holds no line back."""
    edge._sparingly = Sparingly(seconds=0)
    return edge


@pytest.fixture
def lines() -> Iterator[list[str]]:
    with logged() as found:
        yield found


def test_anybody_may_tell_the_class_and_the_session_of_a_request(lines: list[str]) -> None:
    assert read({"class": "tool.2", "session": "s 1"}) == Wishes(request_class="tool.2", session="s 1")
    assert not lines
    for bad in ("", "two words", "x" * 65, "é", 3):
        assert read({"class": bad}) == BYPASS
    assert len(lines) == 5 and all("class must be a word of at most 64 letters" in line for line in lines)


def test_by_default_a_client_can_keep_its_own_request_out_and_nothing_else(lines: list[str]) -> None:
    assert read(None) == NOTHING and read({}) == NOTHING
    assert read({"bypass": True}) == BYPASS
    assert read({"store": False}) == Wishes(store=False)
    assert not lines
    assert read({"pin_seconds": 60}) == NOTHING
    assert read({"explain": True}) == NOTHING
    assert read({"tenant": "B"}) == BYPASS, "to serve it among the instance's would share what it wants apart"
    assert [line.partition(": ")[2] for line in lines] == [
        "request r gets less than it wishes for: pin_seconds is not honoured (clients.pin)",
        "request r gets less than it wishes for: explain needs admin.token as token",
        "request r bypasses the cache: clients may not name a tenant (clients.tenant)",
    ]


def test_settings_say_which_wishes_are_honoured() -> None:
    assert read({"pin_seconds": 60}, **ALL_ALLOWED) == Wishes(pin_seconds=60.0)
    assert read({"tenant": "B"}, **ALL_ALLOWED) == Wishes(tenant=hashed_name("B"))
    assert read({"bypass": True, "store": False}, **{"clients.bypass": False, "clients.store": False}) == NOTHING
    assert read({"tenant": "A"}, tenant="A") == Wishes(tenant=hashed_name("A")), "the instance's own"
    assert read({"explain": True}, **ALL_ALLOWED) == NOTHING, "there is no setting for this"


def test_the_operators_token_allows_everything() -> None:
    wishes = {"token": TOKEN["admin.token"], "explain": True, "tenant": "B", "pin_seconds": 5, "store": False}
    closed = {**TOKEN, "clients.bypass": False, "clients.store": False}
    assert read(wishes, **closed) == Wishes(False, False, hashed_name("B"), 5.0, True)
    for token in ("", "open", "open sesame "):
        assert read({"token": token, "explain": True}, **TOKEN) == NOTHING
    assert read({"token": "", "explain": True}) == NOTHING, "where there is no token nobody has it"


@pytest.mark.parametrize(
    "wishes",
    [
        *({"bypass": bad} for bad in (1, 0, None, "yes", [True], {"bypass": True})),
        *({"pin_seconds": bad} for bad in (float("inf"), float("nan"), -1, 10**400, True, "60", None, [1])),
        *({"tenant": bad} for bad in ("t" * (MOST_TENANT + 1), 5, None, ["a"], b"a", "\ud800")),
        *({"token": bad} for bad in (5, "t" * 5_000)),
        *({bad: 1} for bad in ("tenants", "\ud800", "a\nb", "k" * 1_000_000, 5, (1, 2), "")),
        "bypass",
        ["bypass"],
        5,
        True,
    ],
    ids=lambda value: repr(value)[:30],
)
def test_malformed_wishes_bypass_the_cache_and_the_log_says_so_in_one_short_line(
    wishes: object, lines: list[str]
) -> None:
    assert read(wishes, **ALL_ALLOWED) == BYPASS
    (line,) = lines
    assert "request r bypasses the cache: kv_transfer_params.lmc" in line
    assert is_short_and_clean(line)


@pytest.mark.parametrize("parameters", ["x", 5, ["lmc"], 1.5, True, b"lmc"])
def test_a_field_of_another_type_bypasses_the_cache(parameters: object, lines: list[str]) -> None:
    """vLLM takes kv_transfer_params from vllm_xargs, too, where it may be a text or a number."""
    assert Edge(configured(), "kv_transfer_params").read(parameters, "r") == BYPASS
    assert len(lines) == 1


def test_what_is_not_lmcs_is_left_alone() -> None:
    edge = Edge(configured(), "custom_params")
    for parameters in (None, {}, {"thinking_budget": 9}, {"lmc": None}):
        assert edge.read(parameters, "r", "a salt") == NOTHING
    for odd in (5, b"s", "\ud800"):
        assert edge.read(None, "r", "a salt", odd) == BYPASS


def test_a_flood_of_wishes_is_one_line_with_a_number(lines: list[str]) -> None:
    edge = Edge(configured(), "kv_transfer_params")
    for number in range(1_000):
        edge.read({"lmc": {"tenant": str(number)}}, f"r{number}")
    assert len(lines) == 1


CONFIGS = [configured(), configured(**ALL_ALLOWED, **TOKEN), configured(tenant="A", **TOKEN)]


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck), phases=QUICK)
@given(st.lists(st.tuples(PARAMETERS, LONG_TEXT, st.none() | LONG_TEXT), min_size=20, max_size=20), st.integers(0, 2))
def test_whatever_comes_in_wishes_within_bounds_come_out(inputs: list[tuple[Any, str, Any]], which: int) -> None:
    """10,000 inputs."""
    edge = talkative(Edge(CONFIGS[which], "kv_transfer_params"))
    with logged() as lines:
        for parameters, request_id, salt in inputs:
            before = len(lines)
            granted = edge.read(parameters, request_id, salt)
            assert type(granted.bypass) is type(granted.store) is type(granted.explain) is bool
            assert len(granted.tenant) in (0, 32) and 0 <= granted.pin_seconds < float("inf")
            if which == 0:
                assert (granted.tenant, granted.pin_seconds, granted.explain) == ("", 0.0, False)
            assert len(lines) - before <= 1 and all(map(is_short_and_clean, lines[before:]))


@settings(max_examples=1_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(LONG_TEXT, LONG_TEXT)
def test_names_are_short_clean_and_different_for_different_texts(one: str, other: str) -> None:
    for text in (one, other):
        assert len(request_name(text)) <= 100 and is_short_and_clean(request_name(text))
        assert len(hashed_name(text)) == (32 if text else 0)
        assert request_name(request_name(text)) != request_name(text) or request_name(text) == text
    assert (request_name(one) == request_name(other)) == (hashed_name(one) == hashed_name(other)) == (one == other)
