"""The embedded model on SGLang: what the real weights answer does not change, in this process or in the next one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmc.model import EMBEDDED
from tests.engines.sglang_server import SglangServer
from tests.engines.test_sglang import assert_same

pytestmark = [pytest.mark.engine, pytest.mark.sglang, pytest.mark.timeout(1800)]

# Arbitrary token ids; 330 of them are 5 pages and a rest.
PROMPT = [1 + (index * index * 7919 + 31 * index) % 20_000 for index in range(330)]


def test_cold_device_host_and_disk_answer_alike(tmp_path: Path) -> None:
    settings: dict[str, object] = {"host.capacity": "512MiB", "disk.path": str(tmp_path / "disk")}
    with SglangServer(EMBEDDED, tmp_path / "one", settings=settings) as one:
        cold, device = one.generate(PROMPT), one.generate(PROMPT)
        one.settle()
        one.flush()
        host = one.generate(PROMPT)
    with SglangServer(EMBEDDED, tmp_path / "two", settings=settings) as two:
        disk = two.generate(PROMPT)
    assert [(one["device"], one["loaded"]) for one in (cold, device, host, disk)] == [
        (0, 0),
        (320, 0),
        (0, 320),
        (0, 320),
    ]
    for answer in (device, host, disk):
        assert_same(answer, cold)
