"""The wire: a report is sent whenever it says anything that a plan depends on."""

from __future__ import annotations

from collections import Counter

import pytest

from lmc.cache.plan import Report


@pytest.mark.parametrize("report", [Report(Counter({1: 1})), Report(stuck={1}), Report(faults={0: 1})], ids=str)
def test_what_a_plan_depends_on_is_sent(report: Report) -> None:
    assert report and not Report()
