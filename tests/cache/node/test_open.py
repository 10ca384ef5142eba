"""What an engine may not attach with."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmc.cache.keys import Namespace
from lmc.cache.node.open import open_scheduler, open_worker
from lmc.cache.parts import Group
from lmc.errors import ConfigError
from tests.cache.instance import BLOCK_TOKENS, CHUNK_TOKENS, Instance, settings
from tests.cache.node.attached import attached_settings

WHY = "^a model with several KV groups is not supported through a node yet; leave the setting node out$"


def test_a_model_with_several_kv_groups_is_refused(tmp_path: Path) -> None:
    """There is no node: a worker that tried to attach would wait for one."""
    config = attached_settings(tmp_path / "node.sock")
    instance = Instance(settings())
    try:
        worker = instance.workers[0]
        layout = worker.copier.layout
        namespace = Namespace("test", "test", "", "u8", "of both groups", CHUNK_TOKENS)
        with pytest.raises(ConfigError, match=WHY):
            open_worker(config, namespace, layout, rank=0, num_ranks=1, others=[(layout, 1)])
        groups = [Group("full", BLOCK_TOKENS), Group("window", BLOCK_TOKENS, CHUNK_TOKENS)]
        with pytest.raises(ConfigError, match=WHY):
            open_scheduler(config, [worker.ready()], BLOCK_TOKENS, groups=groups)
    finally:
        instance.close()
