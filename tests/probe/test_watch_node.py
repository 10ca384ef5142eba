"""`lmc cache stats` of a node: its engines, and the cache of each namespace."""

from __future__ import annotations

import io
import json
import urllib.request
from pathlib import Path

from rich.console import Console

from lmc.cache.keys import hashed_name
from lmc.cache.node.page import open_page
from lmc.cache.scheduler.endpoint import Endpoint
from lmc.probe.watch import read_stats, render
from tests.cache.instance import Identity, prompt, settings
from tests.cache.node.attached import node_here


def command(page: Endpoint, name: str, **fields: object) -> object:
    request = urllib.request.Request(
        page.url.replace("/metrics", f"/{name}"), json.dumps(fields).encode(), {"Content-Type": "application/json"}
    )
    return json.loads(urllib.request.urlopen(request, timeout=20).read())


def test_the_table_shows_engines_and_namespaces(tmp_path: Path) -> None:
    with node_here(tmp_path / "node.sock") as here:
        page = open_page(settings(metrics_enabled=True), here.node)
        assert page is not None
        one, other = here.engine(model="a"), here.engine(model="b")
        for engine in (one, other):
            engine.serve(prompt(1, 50))
            engine.serve(prompt(1, 50))
        out = io.StringIO()
        console = Console(width=160, file=out)
        before = read_stats(page.url)
        console.print(render(before, None, 0.0))
        console.print(render(read_stats(page.url), before, 1.0))
        text = out.getvalue()
        page.close()
    assert text.count(one.node.namespace.label()) == 2
    assert "a  8 tokens per chunk" in text and "b  8 tokens per chunk" in text
    assert "of memory not taken" in text


def test_metrics_have_labels_for_namespaces_and_engines(tmp_path: Path) -> None:
    with node_here(tmp_path / "node.sock") as here:
        page = open_page(settings(metrics_enabled=True), here.node)
        assert page is not None
        one, other = here.engine(model="a"), here.engine(model="b")
        for engine in (one, other):
            engine.serve(prompt(1, 50))
        here.wait_idle()

        def value(name: str, **labels: str) -> float | None:
            return page.registry.get_sample_value(name, labels)

        for engine in (one, other):
            label = engine.node.namespace.label()
            assert value("lmc_requests_total", namespace=label) == 1
            assert value("lmc_slots_used", namespace=label, tier="host") == 6
            name = here.node.sessions[1].engine
            assert value("lmc_engine_attached", namespace=label, engine=name) == 1
        assert (value("lmc_node_free_bytes") or 0) > 0
        page.close()


def test_commands_go_to_every_namespace(tmp_path: Path) -> None:
    with node_here(tmp_path / "node.sock") as here:
        page = open_page(settings(metrics_enabled=True), here.node)
        assert page is not None
        one = here.engine()
        tokens = prompt(1, 50)
        one.serve(tokens)

        label = one.node.namespace.label()
        assert command(page, "pin", tokens=tokens, owner="me") == {"namespaces": {label: {"chunks": 6, "pinned": 6}}}
        assert command(page, "unpin", owner="me") == {"namespaces": {label: {"unpinned": True}}}
        assert command(page, "clear") == {"namespaces": {label: {"in_use": 0}}}
        assert one.serve(tokens).loaded == 0
        page.close()


def test_commands_mean_the_tenant_of_the_settings(tmp_path: Path) -> None:
    with node_here(tmp_path / "node.sock") as here:
        page = open_page(settings(metrics_enabled=True, tenant="t"), here.node)
        assert page is not None
        engine, tokens = here.engine(), prompt(1, 50)
        engine.serve(tokens, Identity(tenant=hashed_name("t")))
        here.wait_idle()
        label = engine.node.namespace.label()
        assert command(page, "pin", tokens=tokens, owner="me") == {"namespaces": {label: {"chunks": 6, "pinned": 6}}}
        page.close()
