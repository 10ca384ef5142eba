"""Time to first token on SGLang: cold, device hit, and lmc hit from host memory, in turn, on one server.

    .venvs/sglang/bin/python benchmarks/sglang_ttft.py [--model MODEL] [--tokens 2000] [--rounds 7]

Prints one JSON object: medians in seconds, and the two ratios that matter (host / device and host / cold). Exits with 1 when a ratio is
beyond its bound. Everything is measured in one run, in turn, so that a busy machine slows all three alike.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from lmc.model import EMBEDDED
from tests.engines.sglang_server import SglangServer

HOST_TO_DEVICE, HOST_TO_COLD = 1.3, 0.4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED, help="folder or name")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--vocabulary", type=int, default=512, help="prompts are random ids below this")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {"cold": [], "device": [], "host": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        SglangServer(options.model, Path(folder), settings={"host.capacity": "2GiB"}) as server,
    ):
        for number in range(options.rounds + 1):
            generator = random.Random(number)
            prompt = [generator.randrange(2, options.vocabulary) for _ in range(options.tokens)]
            server.flush()
            answers = {"cold": server.generate(prompt, max_tokens=1), "device": server.generate(prompt, max_tokens=1)}
            server.settle()
            server.flush()
            answers["host"] = server.generate(prompt, max_tokens=1)
            assert answers["cold"]["device"] == answers["cold"]["loaded"] == 0
            assert answers["device"]["device"] == answers["host"]["loaded"] > options.tokens * 0.9
            if number:  # the first round warms up
                for kind, answer in answers.items():
                    seconds[kind].append(answer["seconds"])
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    ratios = {
        "host_to_device": medians["host"] / medians["device"],
        "host_to_cold": medians["host"] / medians["cold"],
    }
    print(json.dumps({"tokens": options.tokens, "rounds": options.rounds, "seconds": medians, **ratios}, indent=2))
    return int(ratios["host_to_device"] > HOST_TO_DEVICE or ratios["host_to_cold"] > HOST_TO_COLD)


if __name__ == "__main__":
    sys.exit(main())
