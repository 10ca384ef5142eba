"""Whether `load: auto` is as quick as the better of loading and computing: python -m benchmarks.load_or_compute [--quick] [--out FOLDER].

vLLM with a disk, and then with a Redis, whose reads are throttled. Prompts that lie there are asked for in turn with `load: always`, with
`load: auto` and with hits that are never loaded, and between them prompts that nobody sent before: one at a time, in one engine, so that a
busy machine slows all alike. What `auto` has measured is its own, and forgotten before each bandwidth. At last the disk turns slow, and
then quick again. The host tier holds one prompt, so that the others come from the tier below.

The throttles are this file's and the test engine's, because no disk or network of exactly that bandwidth exists here; tiers, engine and
server are real. The lowest bandwidth is beside the bars: it is so low that computing is quicker. Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.compression import Link
from lmc.bench.machine import describe_hardware, describe_software
from lmc.cache.directory.speeds import RETRY_SECONDS
from lmc.model import EMBEDDED, resolve_model
from lmc.report import Column, Report, Section, Table, print_table, report_markdown, to_json, write_file
from tests import services
from tests.engines.scenario import TOKEN, kv_bytes_per_token, wish
from tests.engines.vllm_driver import VllmDriver

ARMS = ("always", "auto", "never")
COLD = "cold"
BETTER_BAR, COLD_BAR = 1.05, 1.03
SLOW_REQUESTS = 5  # within so many a tier that turned slow is left alone
BLOCK = 128
BANDWIDTHS = (20e6, 50e6, 200e6, 1_000e6)
SLOW, QUICK = 5e6, 1_000e6  # of the disk that turns
EXPLAIN = wish(explain=True)


@dataclass
class Measured:
    """Of one tier at one bandwidth."""

    tier: str
    bandwidth: float
    seconds: dict[str, list[float]] = field(default_factory=dict)  # to the first token, by arm
    loaded: dict[str, list[int]] = field(default_factory=dict)  # tokens, by arm

    def median(self, arm: str) -> float:
        return statistics.median(self.seconds[arm])

    @property
    def of_better(self) -> float:
        """auto / the better of always and never."""
        return self.median("auto") / min(self.median("always"), self.median("never"))

    @property
    def of_cold(self) -> float:
        return self.median("auto") / self.median(COLD)

    @property
    def reached(self) -> bool:
        return self.of_better <= BETTER_BAR and self.of_cold <= COLD_BAR


@dataclass
class Turned:
    """Requests after the disk turned slow, and after it turned quick again, in order: whether they loaded from it."""

    slow: list[bool] = field(default_factory=list)
    quick: list[bool] = field(default_factory=list)

    @property
    def tried_in_vain(self) -> int:
        """Requests that loaded from the slow disk before it was left alone for good."""
        return max((number for number, loaded in enumerate(self.slow, start=1) if loaded), default=0)

    @property
    def reached(self) -> bool:
        return self.tried_in_vain <= SLOW_REQUESTS and self.quick[-1]


class Prompts:
    def __init__(self, seed: str, tokens: int) -> None:
        self._generator = random.Random(seed)
        self._tokens = tokens
        self.stored = [self.fresh() for _ in range(len(ARMS))]

    def fresh(self) -> list[int]:
        return [self._generator.randrange(5, 5_000) for _ in range(self._tokens)]


def first_token(engine: VllmDriver, prompt: list[int], arm: str, tier: str) -> tuple[float, int]:
    """Seconds, and the tokens that were loaded from a tier."""
    engine.call("load_as", arm=arm)
    engine.call("reset_device")
    seconds, hits = engine.call("first_token", prompt=prompt, extra_args=EXPLAIN)
    engine.call("settle")
    return seconds, hits.get(tier, 0)


def measure(
    engine: VllmDriver, tier: str, prompts: Prompts, throttle: Callable[[float], None], bandwidth: float, rounds: int
) -> Measured:
    measured = Measured(tier, bandwidth)
    throttle(bandwidth)
    engine.call("load_as", arm="forget")
    for number in range(rounds):
        asked = [(arm, prompts.stored[(number + index) % len(ARMS)]) for index, arm in enumerate(ARMS)]
        for arm, prompt in [*asked, (COLD, prompts.fresh())]:
            chosen = "auto" if arm == COLD else arm  # auto sees what computing takes
            seconds, loaded = first_token(engine, prompt, chosen, tier)
            assert loaded == 0 or arm in ("always", "auto"), (arm, loaded)
            measured.seconds.setdefault(arm, []).append(seconds)
            measured.loaded.setdefault(arm, []).append(loaded)
    return measured


def measure_turn(engine: VllmDriver, prompts: Prompts, throttle: Callable[[float], None], requests: int) -> Turned:
    turned = Turned()
    throttle(QUICK)
    engine.call("load_as", arm="forget")
    first_token(engine, prompts.fresh(), "auto", "disk")
    for number in range(2 * len(ARMS)):
        first_token(engine, prompts.stored[number % len(ARMS)], "auto", "disk")
    throttle(SLOW)
    for number in range(requests):
        turned.slow.append(first_token(engine, prompts.stored[number % len(ARMS)], "auto", "disk")[1] > 0)
    throttle(QUICK)
    until = time.monotonic() + 20 * RETRY_SECONDS
    number = requests
    while time.monotonic() < until and not (turned.quick and turned.quick[-1]):
        turned.quick.append(first_token(engine, prompts.stored[number % len(ARMS)], "auto", "disk")[1] > 0)
        number += 1
    return turned


def throttle_disk(engine: VllmDriver, bandwidth: float) -> None:
    engine.call("throttle_disk", bytes_per_s=bandwidth)


def throttle_proxy(front: services.Proxy, bandwidth: float) -> None:
    link = Link(bandwidth)

    def carry(data: bytes) -> bytes:
        link.carry(len(data))
        return data

    front.to_client = carry


def measure_all(model: Path, tokens: int, rounds: int, bandwidths: tuple[float, ...]) -> tuple[list[Measured], Turned]:
    common: dict[str, Any] = {
        "chunk_tokens": BLOCK,
        "host.capacity": tokens // BLOCK * kv_bytes_per_token(model) * BLOCK,
        "metrics.enabled": False,
        "strict": True,
        "admin.token": TOKEN,
        "load": "auto",
        "load_deadline": 60.0,
    }
    options = {"block_size": BLOCK, "max_model_len": tokens + BLOCK, "max_num_batched_tokens": tokens + BLOCK}
    found: list[Measured] = []
    with (
        tempfile.TemporaryDirectory() as name,
        services.redis_server(Path(name)) as server,
        services.proxy(server.port) as front,
    ):
        below = {"disk": {"disk.path": f"{name}/disk"}, "redis": {"redis.url": f"redis://127.0.0.1:{front.port}"}}
        for tier, settings in below.items():
            with VllmDriver(model, settings=common | settings, enable_prefix_caching=True, **options) as engine:
                throttle = partial(throttle_disk, engine) if tier == "disk" else partial(throttle_proxy, front)
                prompts = Prompts(tier, tokens)
                engine.generate([list(range(5, 5 + 2 * BLOCK))], max_tokens=2)  # warms up
                for prompt in prompts.stored:
                    first_token(engine, prompt, "always", tier)
                first_token(engine, prompts.fresh(), "always", tier)  # takes the last one's place in the host
                found += [measure(engine, tier, prompts, throttle, rate, rounds) for rate in bandwidths]
                if tier == "disk":
                    turned = measure_turn(engine, prompts, throttle, 4 * SLOW_REQUESTS)
    return found, turned


def as_report(found: list[Measured], turned: Turned, tokens: int, model: str) -> Report:
    rows = [
        (
            one.tier,
            one.bandwidth / 1e6,
            *(one.median(arm) * 1e3 for arm in (*ARMS, COLD)),
            f"{sum(loaded > 0 for loaded in one.loaded['auto'])} of {len(one.loaded['auto'])}",
            one.of_better,
            one.of_cold,
            one.reached,
        )
        for one in found
    ]
    times = Table(
        "Times to the first token",
        [
            Column("tier"),
            Column("bandwidth", "MB/s"),
            *(Column(arm, "ms") for arm in (*ARMS, COLD)),
            *(Column(name) for name in ("auto loaded", "auto / better", "auto / cold", "reached")),
        ],
        rows,
        note=f"Medians, of one prompt of {tokens:,} tokens at a time; from the call to the first token, without HTTP. "
        f"The better is the better of always and never. At most: auto / better {BETTER_BAR}, auto / cold {COLD_BAR}.",
    )
    turn = Table(
        "A disk that turns slow",
        [Column("requests"), Column("loaded from it"), Column("last that did"), Column("at most"), Column("reached")],
        [
            (
                f"after it turned slow, to {SLOW / 1e6:g} MB/s",
                f"{sum(turned.slow)} of {len(turned.slow)}",
                turned.tried_in_vain,
                SLOW_REQUESTS,
                turned.tried_in_vain <= SLOW_REQUESTS,
            ),
            (
                f"after it turned quick again, to {QUICK / 1e6:g} MB/s, until one loads",
                f"{sum(turned.quick)} of {len(turned.quick)}",
                len(turned.quick),
                "",
                turned.quick[-1],
            ),
        ],
    )
    command = "python -m benchmarks.load_or_compute " + " ".join(sys.argv[1:])
    metadata = {"command": command.strip(), "model": model} | describe_hardware() | describe_software()
    missed = [f"{one.tier} at {one.bandwidth / 1e6:g} MB/s" for one in found if not one.reached]
    missed += [] if turned.reached else ["the disk that turns slow"]
    summary = f"Bars missed: {', '.join(missed)}." if missed else "All bars are met."
    return Report("Load or compute", summary, [Section("Results", "", [times, turn])], metadata)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED, help="folder or name")
    parser.add_argument("--tokens", type=int, default=2_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="short prompts, few rounds and two bandwidths")
    parser.add_argument("--out", type=Path, help="write report.md and results.json here")
    options = parser.parse_args()
    tokens, rounds = (500, 3) if options.quick else (options.tokens, options.rounds)
    bandwidths = (BANDWIDTHS[0], BANDWIDTHS[-1]) if options.quick else BANDWIDTHS
    found, turned = measure_all(resolve_model(options.model), tokens, rounds, bandwidths)
    report = as_report(found, turned, tokens, options.model)
    for table in report.sections[0].items:
        assert isinstance(table, Table)
        print_table(table)
    if options.out is not None:
        write_file(options.out / "report.md", report_markdown(report))
        write_file(
            options.out / "results.json", to_json({"measured": found, "turned": turned, "metadata": report.metadata})
        )
    return int(not (turned.reached and all(one.reached for one in found)))


if __name__ == "__main__":
    sys.exit(main())
