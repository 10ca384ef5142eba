"""An engine process without an engine: it serves prompts from a node until it is killed, and ends with an error at the first wrong byte.

As a program, python -m tests.cache.node.client SOCKET SEED, it writes a line for each prompt.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, MutableSequence
from pathlib import Path

from tests.cache.instance import Served, prompt
from tests.cache.node.attached import Attached, attached_settings

PROMPTS = 12


def serve(path: Path, seed: int, served: Callable[[Served], None]) -> None:
    engine = Attached(attached_settings(path))
    chance = random.Random(seed)
    while True:
        tokens = prompt(chance.randrange(PROMPTS), 20 + 8 * chance.randrange(6))
        served(engine.serve(tokens, settle=chance.random() < 0.5))


def serve_forever(path: Path, seed: int, counts: MutableSequence[int]) -> None:
    """counts: prompts served, and those with a hit."""

    def count(served: Served) -> None:
        counts[0] += 1
        counts[1] += served.loaded > 0

    serve(path, seed, count)


def say(served: Served) -> None:
    sys.stdout.write(f"served {served.loaded} {served.miss}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]), say)
