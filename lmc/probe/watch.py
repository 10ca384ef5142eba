"""The live table of `lmc cache stats`: it reads a running cache's /stats twice and shows the difference."""

from __future__ import annotations

import itertools
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

import orjson
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from lmc.errors import RunError
from lmc.units import format_count, format_percent, format_rate, format_size

Stats = Mapping[str, Any]  # what lmc.cache.observe.stats makes, read back from JSON


def read_stats(url: str, token: str | None = None) -> Stats:
    """Read /stats. token is admin.token, which a cache requires when it listens for other machines.

    Raises RunError when no cache answers.
    """
    base = url if "://" in url else f"http://{url}"
    address = base.removesuffix("/").removesuffix("/metrics") + "/stats"
    try:
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"} if token else {})
        with urllib.request.urlopen(request, timeout=5) as answer:
            stats = orjson.loads(answer.read())
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise RunError(f"{address} wants admin.token; put it into LMC_ADMIN_TOKEN") from None
        raise RunError(f"no cache answers at {address}: {error}; lmc serve prints the address") from None
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise RunError(f"no cache answers at {address}: {error}; lmc serve prints the address") from None
    if not isinstance(stats, dict) or ("tiers" not in stats and "namespaces" not in stats):
        raise RunError(f"{address} is not the endpoint of a cache; lmc serve prints the address")
    return stats


def watch(url: str, interval: float, once: bool, console: Console | None = None, token: str | None = None) -> None:
    """Show the table until the user interrupts it, or once. Raises RunError when the cache does not answer."""
    console = console or Console()
    before = read_stats(url, token)
    if once:
        console.print(render(before, None, 0.0))
        return
    with Live(render(before, None, 0.0), console=console, auto_refresh=False) as live:
        for _ in itertools.count():
            started = time.monotonic()
            time.sleep(interval)
            now = read_stats(url, token)
            live.update(render(now, before, time.monotonic() - started), refresh=True)
            before = now


def render(now: Stats, before: Stats | None, seconds: float) -> RenderableType:
    """Render the totals, and the rates since `before`, which was read `seconds` earlier."""
    if "namespaces" in now:
        return _node(now, before, seconds)
    return Group(_overview(now, before), _tiers(now), _transfers(now, before, seconds), _copies(now), _misses(now))


def _node(now: Stats, before: Stats | None, seconds: float) -> RenderableType:
    """The engines of a node, and the cache of each of its namespaces."""
    table = Table(title=f"node, {format_size(now['memory']['free_bytes'])} of memory not taken", title_justify="left")
    for column in ("engine", "namespace", "attached", "requests", "loaded chunks", "open copies"):
        table.add_column(column, justify="left" if column in ("engine", "namespace") else "right")
    for one in now["engines"]:
        attached = "yes" if one["attached"] else "no"
        numbers = map(format_count, (one["requests"], one["loaded_chunks"], one["open_copies"]))
        table.add_row(one["engine"], one["namespace"], attached, *numbers)
    earlier = {one["namespace"]: one for one in before["namespaces"]} if before is not None else {}
    return Group(table, *(render(one, earlier.get(one["namespace"]), seconds) for one in now["namespaces"]))


def _overview(now: Stats, before: Stats | None) -> Table:
    table = Table(title=f"{now['model']}  {now['chunk_tokens']} tokens per chunk", title_justify="left")
    for column in ("", "requests", "prompt tokens", "engine's own", "loaded", "hit rate"):
        table.add_column(column, justify="right" if column else "left")
    readings: list[tuple[str, Stats | None]] = [("since the start", None)]
    if before is not None:
        readings.append(("now", before))
    for name, since in readings:
        tokens = _grown(now, since, "lookup_tokens")
        own, loaded = _grown(now, since, "device_tokens"), _grown(now, since, "hit_tokens")
        rate = format_percent((own + loaded) / tokens) if tokens else "-"
        requests = _grown(now, since, "requests")
        table.add_row(name, *map(format_count, (requests, tokens, own, loaded)), rate)
    return table


def _tiers(now: Stats) -> Table:
    table = Table()
    for column in ("tier", "chunks", "of", "bytes", "loaded tokens", "evicted", "writes under way"):
        table.add_column(column, justify="left" if column == "tier" else "right")
    labels = now["by_label"]
    for tier in dict.fromkeys([*now["tiers"], *now["known_chunks"]]):
        held = now["tiers"].get(tier)
        table.add_row(
            tier,
            format_count(held["chunks"] if held else now["known_chunks"][tier]),
            format_count(held["capacity"]) if held else "known",
            format_size(held["bytes"]) if held else "-",
            format_count(labels.get("hit_tokens", {}).get(tier, 0)),
            format_count(labels.get("evicted_chunks", {}).get(tier, 0)) if held else "-",
            format_count(now["write_queue"][tier]) if tier in now["write_queue"] else "-",
        )
    return table


def _transfers(now: Stats, before: Stats | None, seconds: float) -> Table:
    table = Table()
    for column in ("transfer", "bytes", "rate now"):
        table.add_column(column, justify="left" if column == "transfer" else "right")
    for name, total in now["by_label"].get("transferred_bytes", {}).items():
        earlier = before["by_label"].get("transferred_bytes", {}).get(name, 0.0) if before is not None else total
        table.add_row(name, format_size(total), format_rate((total - earlier) / seconds) if seconds else "-")
    return table


def _copies(now: Stats) -> Table:
    """Say which backend copies between blocks and slots, which backends failed, and what is wrong with host memory."""
    table = Table()
    for column in ("copies by", "batches"):
        table.add_column(column, justify="left" if column == "copies by" else "right")
    for name, batches in now["by_label"].get("transfer_batches", {}).items():
        table.add_row(name, format_count(batches))
    for reason, batches in now["by_label"].get("transfer_refusals", {}).items():
        table.add_row(f"not by {reason}", format_count(batches))
    for rank, copying in now["ranks"].items():
        if copying["problem"]:
            table.add_row(f"[red]rank {rank}: {copying['problem']}[/red]", "")
    return table


def _misses(now: Stats) -> Table:
    table = Table()
    for column in ("lookups ended by", "times", "tokens to compute"):
        table.add_column(column, justify="left" if column.startswith("lookups") else "right")
    tokens = now["by_label"].get("miss_tokens", {})
    reasons = now["by_label"].get("misses", {})
    for reason, times in sorted(reasons.items(), key=lambda item: -item[1]):
        table.add_row(reason, format_count(times), format_count(tokens.get(reason, 0)))
    for operation, times in now["by_label"].get("failures", {}).items():
        if times:
            table.add_row(f"[red]{operation} failed[/red]", format_count(times), "")
    return table


def _grown(now: Stats, before: Stats | None, name: str) -> float:
    return _total(now, name) - (_total(before, name) if before is not None else 0.0)


def _total(stats: Stats, name: str) -> float:
    return float(stats["totals"].get(name, 0.0) + sum(stats["by_label"].get(name, {}).values()))
