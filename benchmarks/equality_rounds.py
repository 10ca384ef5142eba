"""Random traffic with faults, one seed after the other: python -m benchmarks.equality_rounds [--scenario NAME] [--rounds N] [--first SEED].

Each round is the run of tests/engines/test_vllm_equality.py with other requests, faults and times: a tiny model with and without lmc. It
finds what goes wrong once in many runs. Exit code 1 when in any round a token differs, something is left over, or nothing was preempted or
loaded.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.engines.equality import SCENARIOS, random_sessions, run_scenario
from tests.engines.tiny_model import make_tiny_llama
from tests.engines.vllm_driver import VllmDriver

REQUESTS = 120


def run_rounds(name: str, first: int, rounds: int) -> int:
    """The number of rounds that went wrong."""
    scenario = next(one for one in SCENARIOS if one.name == name)
    wrong = 0
    with tempfile.TemporaryDirectory() as top:
        model = make_tiny_llama(Path(top) / "tiny")
        with VllmDriver(model, settings=None, enable_prefix_caching=False) as plain:
            for seed in range(first, first + rounds):
                requests = random_sessions(seed, REQUESTS)
                started = time.monotonic()
                wanted = plain.call("traffic", requests=requests, seed=seed, concurrency=12, chances={})["outcomes"]
                with tempfile.TemporaryDirectory() as folder:
                    verdict = run_scenario(
                        scenario,
                        model,
                        requests,
                        wanted,
                        Path(folder),
                        seed=seed,
                        host_chunks=16,
                        disk_chunks=32,
                        blocks=48,
                        context=768,
                    )
                wrong += not verdict.passed
                print(
                    f"seed {seed}: {'; '.join(verdict.faults) or 'equal'} ({verdict.comparison.requests} requests, "
                    f"{len(verdict.comparison.ties)} ties, {verdict.preemptions} preemptions, "
                    f"{verdict.tally['failed_loads']} failed loads, {time.monotonic() - started:.0f} s)",
                    flush=True,
                )
    print(f"{rounds - wrong} of {rounds} rounds of {name!r} are equal")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenario", default="mixed", choices=[one.name for one in SCENARIOS])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--first", type=int, default=1, help="the first round's seed")
    options = parser.parse_args()
    return int(run_rounds(options.scenario, options.first, options.rounds) > 0)


if __name__ == "__main__":
    sys.exit(main())
