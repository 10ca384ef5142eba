from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from lmc.errors import TraceError
from lmc.sim import study_pictures
from lmc.sim.build import TraceBuilder
from lmc.sim.cost import CostModel, Prefill, TierCost
from lmc.sim.study import make_study
from lmc.sim.study_page import report_json, write_report
from lmc.sim.trace import Trace, coarsen
from tests.sim.chained_traces import naive_lru, tokens_of

COST = CostModel(Prefill(0.01, 0.001, 0.0), 100, {"host": TierCost("host", 1e9)}, 1.0)


def made() -> Trace:
    builder = TraceBuilder("made", "test", 16)
    generator = np.random.default_rng(1)
    for number in range(60):
        chat = int(generator.integers(0, 8))
        chain = [0, *(100 * chat + step for step in range(1, 2 + number // 6))]
        builder.add(number + 1, chain, 7.0 * number, len(chain) * 16 - 3, 4)
    return builder.finish()


def test_numbers_of_the_study_are_those_of_a_naive_simulator() -> None:
    trace = made()
    study = make_study(trace, ("fifo",), 4)

    def rate(some: Trace, capacity: int, ttl_s: float = float("inf"), first: int = 0) -> float:
        hits = naive_lru(some, capacity, ttl_s)
        tokens = [tokens_of(some, request, found) for request, found in enumerate(hits)]
        return sum(tokens[first:]) / int(some.input_tokens[first:].sum())

    for window, first in (("all", 0), ("last-half", 30)):
        rows = study.rows[window]  # type: ignore[index]
        assert {row.policy for row in rows} == {"lru", "fifo", "belady"}
        for row in rows:
            if row.policy == "lru":
                assert row.token_hit_rate == pytest.approx(rate(trace, int(row.capacity_blocks), first=first))
        best = {(row.policy, row.capacity_blocks): row.hit_blocks for row in study.rows["all"]}
        assert all(best["belady", size] >= best[policy, size] for policy in ("lru", "fifo") for size in study.sizes)
    for chunk, curve in study.chunk_curves.items():
        assert curve.at(9)[1] / curve.total_tokens == pytest.approx(rate(coarsen(trace, chunk), 9, first=30))
    for row_index, ttl_s in enumerate(study.ttls_s):
        for column, size in enumerate(study.sizes):
            assert study.ttl_rates[row_index, column] == pytest.approx(rate(trace, size, ttl_s, 30))
    assert study.tier_rates[0, 2] == pytest.approx(rate(trace, study.tier_sizes[2], first=30))
    assert study.tier_rates[4, 2] == pytest.approx(rate(trace, study.tier_sizes[4], first=30))
    assert study.priced == []


def test_report_is_one_page_with_pictures_and_rows(tmp_path: Path) -> None:
    study = make_study(made(), ("fifo",), 3, COST)
    page = write_report(study, tmp_path / "report", "lmc sim report made", "here, CC0")
    text = page.read_text()
    assert text.count("data:image/png") == 6 and "An unlimited cache would hit" in text and "here, CC0" in text
    files = {path.name for path in page.parent.iterdir()}
    assert {"report.html", "rows.csv"} < files and sum(name.endswith(".png") for name in files) == 6
    rows = list(csv.DictReader((page.parent / "rows.csv").open()))
    result = json.loads(json.dumps(report_json(study, page)))
    assert len(rows) == sum(len(part) for part in result["rows"].values()) == 2 * 3 * 3


def test_sizes_are_bytes_where_a_tokens_kv_is_known(tmp_path: Path) -> None:
    def page(token_bytes: int = 0) -> str:
        return write_report(make_study(made(), ("fifo",), 3, token_bytes=token_bytes), tmp_path, "c").read_text()

    assert ">capacity<small>tokens</small>" in page() and ">capacity<small>GiB</small>" not in page()
    assert ">capacity<small>GiB</small>" in page(token_bytes=2**20)
    study = make_study(made(), ("fifo",), 3, COST)
    assert study.trace.block_bytes == 16 * COST.token_bytes


def test_one_window_is_shown_and_each_capacity_once(tmp_path: Path) -> None:
    study = make_study(made(), ("fifo",), 2)  # the nearest sizes to the shares of the table are the same
    text = write_report(study, tmp_path, "c").read_text()
    assert text.count("last half of the requests") >= 5 and "all requests" not in text
    table = text[text.index("Hits by capacity") :]
    assert table[: table.index("</table>")].count("<tr>") <= 1 + len(study.sizes)


def test_write_modes_are_those_that_serve_has() -> None:
    """The page once showed tiers that keep a chunk in one place only, which no setting gives."""
    study = make_study(made(), ("fifo",), 3, modes=True)
    assert [(mode.write, mode.disk_blocks >= mode.host_blocks) for mode in study.modes] == [
        ("through", True), ("around", True), ("back", True),
    ] * 2  # fmt: skip
    through = study.modes[0]
    chunked = coarsen(made(), 16)
    hits = [min(found, (int(tokens) - 1) // 16) for found, tokens in zip(
        naive_lru(chunked, through.disk_blocks), chunked.input_tokens, strict=True
    )]  # fmt: skip
    most = 16 * sum(hits[30:]) / int(chunked.input_tokens[30:].sum())
    assert through.host_rate + through.disk_rate == pytest.approx(most, abs=0.02)
    assert "write: through" in study_pictures.tier_map(study).caption


def test_a_trace_of_lengths_has_no_study() -> None:
    builder = TraceBuilder("lengths", "azure", 1)
    builder.add(1, [], 0.0, 5, 5)
    with pytest.raises(TraceError, match="hits cannot be simulated"):
        make_study(builder.finish(lengths_only=True))
