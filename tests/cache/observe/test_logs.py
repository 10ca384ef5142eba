from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from lmc.cache.observe.logs import JsonFormatter, Sparingly, facts, use_format
from lmc.cache.tiers.disk import DiskTier
from lmc.errors import TierFull
from tests.cache.instance import Instance, prompt, settings


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What lmc logs as JSON."""
    ours = logging.getLogger("lmc")
    before = (ours.handlers, ours.level, ours.propagate)
    use_format("json")
    out = io.StringIO()
    ours.handlers[0].setStream(out)
    yield out
    ours.handlers, ours.propagate = before[0], before[2]
    ours.setLevel(before[1])


def test_a_failed_write_is_one_line_with_its_facts_however_often_it_fails(lines, tmp_path, monkeypatch):
    instance = Instance(settings(disk_path=tmp_path))

    def put(self, key, data, parent):
        raise TierFull("disk tier: no room")

    monkeypatch.setattr(DiskTier, "put", put)
    for seed in range(3):
        instance.serve(prompt(seed, 50))
    instance.close()
    found = [line for line in map(json.loads, lines.getvalue().splitlines()) if line["level"] != "info"]
    assert len(found) == 1
    assert found[0]["level"] == "warning" and "no room" in found[0]["message"]
    assert {name: found[0][name] for name in ("operation", "tier", "cause", "rank")} == {
        "operation": "write",
        "tier": "disk",
        "cause": "full",
        "rank": 0,
    }
    assert len(found[0]["key"]) == 64
    assert instance.metric("failure_causes_total", operation="write", tier="disk", cause="full") == 18


def test_lines_are_json_with_traces():
    try:
        raise ValueError("x")
    except ValueError as error:
        record = logging.LogRecord("lmc.a", logging.ERROR, "f", 1, "lmc: %s", ("text",), (ValueError, error, None))
    record.__dict__.update(facts(tier="disk"))
    line = json.loads(JsonFormatter().format(record))
    assert (line["message"], line["tier"], line["level"]) == ("text", "disk", "error")
    assert "ValueError: x" in line["trace"]


def test_repeated_lines_are_held_back_and_counted(lines):
    now = 0.0
    sparingly = Sparingly(10.0, lambda: now)

    def say(*kinds: str) -> list[tuple[str, int]]:
        lines.seek(lines.truncate(0))
        for kind in kinds:
            sparingly.warn(logging.getLogger("lmc.a"), kind, f"about {kind}", tier="disk")
        return [(line["message"], line["held_back"]) for line in map(json.loads, lines.getvalue().splitlines())]

    assert say("a", "a", "b") == [("about a", 0), ("about b", 0)]
    now = 10.0
    assert say("a", "a") == [("about a (1 more since the last such line)", 1)]
