"""Where the time to first token went: the parts add up, and belong to the request that the span names."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from lmc.bench.attribution import Costs, ttft_parts
from lmc.bench.records import read_records, write_results
from lmc.bench.render import build_report
from lmc.bench.spans import client_id, read_spans
from lmc.report import report_html
from tests.bench.conftest import RunSmall
from tests.bench.mock_server import LOOKUP_S, TOKEN_BYTES

NONE = {"reuse": "none", "args": ["--no-enable-prefix-caching", "--us-per-token", "20"]}
CACHED = {"reuse": "cache", "cache": {}, "args": ["--us-per-token", "20"]}
LOADS = [{"kind": "closed"}, {"kind": "poisson", "rate": 40.0}]
SOME = st.floats(0, 1e6)


@pytest.mark.parametrize("load", LOADS, ids=["one at a time", "at once"])
def test_spans_are_joined_by_request_id_at_any_load(
    run_small: RunSmall, tmp_path: Path, load: dict[str, object]
) -> None:
    results, records = run_small(load=load, arms={"none": NONE, "lmc": CACHED}, bars=[])
    lmc = [record for record in records if record.arm == "lmc"]
    assert len(lmc) == 11
    for record in lmc:
        parts = record.parts
        assert record.cached_by_tier == {"device": 0, "host": record.cached_tokens}
        assert record.load_bytes == record.cached_tokens * TOKEN_BYTES
        assert parts.load_gb_per_s == (pytest.approx(1.0) if record.cached_tokens else None)
        assert parts.ttft_lookup_ms == pytest.approx(LOOKUP_S * 1e3)
        assert parts.ttft_rest_ms is not None
        assert parts.ttft_queue_ms is not None
        assert 0 <= parts.ttft_queue_ms < record.service_ttft_ms, "the mock's clock is another one"
        # It computes before it answers, 20 us a token that did not hit; the lookup is only claimed.
        computed_ms = 0.02 * (record.prompt_tokens - record.cached_tokens)
        assert parts.ttft_rest_ms + parts.ttft_lookup_ms + parts.ttft_load_ms >= computed_ms * 0.9
    assert all(record.asked_ms is None for record in records if record.arm == "none")

    write_results(tmp_path, results, records)
    assert read_records(tmp_path) == records
    header, *lines = (tmp_path / "requests.csv").read_text().splitlines()
    assert {"ttft_queue_ms", "ttft_lookup_ms", "ttft_load_ms", "ttft_rest_ms", "load_gb_per_s", "miss"} <= set(
        header.split(",")
    )
    assert len(lines) == len(records)
    page = report_html(build_report(results, read_records(tmp_path)))
    assert "Time to first token, in parts" in page
    assert "TTFT in parts" in page
    assert "never_stored" in page


@given(
    ttft=SOME, known=st.fixed_dictionaries({name: st.none() | SOME for name in ("asked_ms", "prefill_ms", "load_ms")})
)
def test_parts_add_up_to_the_whole_or_are_unknown(ttft: float, known: dict[str, float | None]) -> None:
    if known["asked_ms"] is not None:
        known = {**known, "lookup_ms": 3.0, "admit_ms": 4.0}
    parts = ttft_parts(ttft, Costs(**known))
    if known["asked_ms"] is None and known["prefill_ms"] is None:
        assert parts.ttft_rest_ms is None
    else:
        whole = [parts.ttft_queue_ms, parts.ttft_lookup_ms, parts.ttft_load_ms, parts.ttft_rest_ms]
        assert sum(part or 0.0 for part in whole) == pytest.approx(ttft, abs=1e-3)
    assert ttft_parts(None, Costs(**known)).ttft_rest_ms is None


@given(
    arm=st.sampled_from(["lmc", "lmc-restarted", "a-1-0123abcd"]), repeat=st.integers(0, 9), session=st.integers(0, 99)
)
def test_the_client_s_id_is_found_in_the_engine_s(arm: str, repeat: int, session: int) -> None:
    ours = f"{arm}/{repeat}/part/{session}/0"
    assert (
        client_id(f"cmpl-{ours}-0-0123abcd")
        == client_id(f"cmpl-{ours}-0-01234567")
        == client_id(f"cmpl-{ours}-0")
        == ours
    )
    assert client_id(ours) == ours
    others = [f"cmpl-{ours}{more}-0-0123abcd" for more in ("0", "/1", "-0")]
    assert all(client_id(a) != client_id(b) for a, b in itertools.combinations([ours, *others], 2))


@pytest.mark.parametrize("ahead_s", [0.0, 1000.0])
def test_the_server_s_clock_is_translated(ahead_s: float) -> None:
    """Over a path whose way back takes longer than the way there, as it is with delayed acknowledgements."""

    async def answer(request: web.Request) -> web.Response:
        now_s = time.perf_counter()
        await asyncio.sleep(0.05)
        span = {"request": "r", "hit_tokens": {}, "miss": None, "load_bytes": 0, "load_seconds": 0.0}
        times = dict.fromkeys(("asked_s", "answered_s", "admitted_s"), 7.0 + ahead_s)
        return web.json_response({"now_s": now_s + ahead_s, "requests": [span | times]})

    async def read() -> float:
        app = web.Application()
        app.router.add_get("/requests", answer)
        async with TestServer(app) as server, aiohttp.ClientSession() as http:
            return (await read_spans(http, [str(server.make_url("/metrics"))]))["r"].asked_s

    error_s = abs(asyncio.run(read()) - 7.0)
    assert error_s < 1e-9 if ahead_s == 0 else error_s < 1.0
