from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lmc.cli import app
from lmc.errors import RunError
from lmc.probe.watch import read_stats, render, watch
from tests.cache.instance import Instance, prompt, settings


@pytest.fixture
def instance(tmp_path) -> Iterator[Instance]:
    opened = Instance(settings(metrics_enabled=True, disk_path=tmp_path))
    yield opened
    opened.close()


def text(renderable: object) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(renderable)
    return out.getvalue()


def test_the_table_shows_totals_and_what_happened_since(instance):
    url = instance.scheduler.metrics_url
    tokens = prompt(1, 50)
    instance.serve(tokens)
    before = read_stats(url)
    instance.serve(tokens)
    shown = text(render(read_stats(url), before, 2.0))
    overview = [line.split() for line in shown.splitlines() if "since the start" in line or " now " in line]
    assert "48.0" in overview[0]
    assert "96.0" in overview[1], "the second request was a hit but for two tokens"
    assert "never stored" in shown and "disk write" in shown
    assert "1.2 kB/s" in shown, "2,304 bytes were loaded in 2 s"
    assert [line.split() for line in shown.splitlines() if "host/" in line] == [
        ["│", "host/store", "│", "1", "│"],
        ["│", "host/load", "│", "1", "│"],
    ]


def test_a_problem_with_host_memory_is_shown(instance):
    instance.workers[0]._slab.degrade("all 64 slots stay pageable: no CUDA driver")
    instance.serve(prompt(1, 50))
    assert "rank 0: all 64 slots stay pageable: no CUDA driver" in text(
        render(read_stats(instance.scheduler.metrics_url), None, 0)
    )


def test_the_command_prints_json_or_a_table(instance):
    instance.serve(prompt(1, 50))
    address = instance.scheduler.metrics_url.removeprefix("http://").removesuffix("/metrics")
    runner = CliRunner()
    assert '"lookup_tokens": 50.0' in runner.invoke(app, ["cache", "stats", address, "--json"]).output
    assert "never stored" in runner.invoke(app, ["cache", "stats", address, "--once"]).output


def test_a_cache_that_does_not_answer_is_one_line():
    with pytest.raises(RunError, match=r"no cache answers at http://127\.0\.0\.1:9/stats"):
        watch("127.0.0.1:9", 1.0, True)
