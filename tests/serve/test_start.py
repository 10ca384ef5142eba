from __future__ import annotations

import pytest

from lmc.serve.start import _describe_cache
from lmc.units import format_size
from tests.cache.instance import CHUNK_BYTES, Instance, settings
from tests.services import LOCAL, free_port


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_ready_line_tells_the_tiers_over_all_ranks(tmp_path, num_ranks):
    instance = Instance(settings(metrics_enabled=True, disk_path=tmp_path), num_ranks)
    try:
        url = instance.scheduler.metrics_url
        host, disk = (slots for _, slots in instance.scheduler.directory.usage().values())
        sizes = [format_size(slots * CHUNK_BYTES * num_ranks) for slots in (host, disk)]
        expected = f"host {sizes[0]} ({host:,} chunks), disk {sizes[1]} ({disk:,} chunks)"
        assert _describe_cache(True, url) == f'metrics={url} tiers="{expected}"'
    finally:
        instance.close()


def test_the_ready_line_tells_a_cache_that_does_not_answer() -> None:
    assert _describe_cache(True, f"http://{LOCAL}:{free_port()}/metrics").startswith("cache=FAILED (")
    assert _describe_cache(True, None) == "cache=on metrics=off"
    assert _describe_cache(False, None) == "cache=off"
