"""What somebody must read to follow a request: few files, and not much in those that a newcomer reads first."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType

from tests.cache.instance import Instance, prompt, settings

ROOT = Path(__file__).parents[2]
FIRST = [
    "README.md",
    "docs/architecture.md",
    "lmc/cache/config.py",
    "lmc/cache/keys.py",
    "lmc/cache/transfer/layout.py",
    "lmc/cache/policy/base.py",
    "lmc/cache/tiers/base.py",
    "lmc/cache/directory/request.py",
    "lmc/cache/scheduler/cache.py",
]


def test_a_host_hit_runs_through_few_files(instances: list[Instance]) -> None:
    """Lookup, load, forward pass, store and report of six chunks, the scheduler's half and the worker's."""
    instance = Instance(settings())
    instances.append(instance)
    tokens = prompt(1, 50)
    instance.serve(tokens)
    assert instance.workers[0]._slab.wait(timeout=60), "its thread is no part of the request's way"
    files: set[str] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "lmc" / "cache"):
            files.add(str(path.relative_to(ROOT)))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        served = instance.serve(tokens)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert served.sources == {"host": 48}
    assert 10 < len(files) <= 20, sorted(files)


def test_what_a_newcomer_reads_first_is_short() -> None:
    assert sum(len((ROOT / name).read_text().splitlines()) for name in FIRST) < 1_700
