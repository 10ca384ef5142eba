"""When a run of tests/engines/equality.py is passed."""

from __future__ import annotations

from dataclasses import replace

from tests.engines.equality import Comparison, Verdict

GOOD = Verdict(Comparison(), {}, {}, 1, {"host": 64}, {}, {}, {"pins": 0})


def test_a_run_that_never_tried_lmc_is_not_passed() -> None:
    assert GOOD.passed and GOOD.faults == []
    assert replace(GOOD, preemptions=0).faults == ["no request was preempted"]
    assert replace(GOOD, loaded={"host": 0}).faults == ["no token was loaded"]
    assert replace(GOOD, leftovers={"pins": 2}).faults == ["2 pins left over"]
    assert replace(GOOD, comparison=Comparison(differences=["r1: token 3"])).faults == ["r1: token 3"]
