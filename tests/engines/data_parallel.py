"""One of several data-parallel engines in a process of its own, without vLLM's server around them.

Of a model without experts such engines are told that they are alone, apart from an index and the name of their transfer. A test
with the server itself is in test_serve_node.py.
"""

from __future__ import annotations

from typing import Any


def be_one_of_several(rank: int) -> None:
    """The engine that this process will start is the one of this rank, as vLLM's run_engine_core sets it up."""
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_engine_config

    def create_for_rank(self: Any, *arguments: Any, **named: Any) -> Any:
        config = create(self, *arguments, **named)
        config.parallel_config.data_parallel_index = rank
        config.kv_transfer_config.engine_id = f"{config.kv_transfer_config.engine_id}_dp{rank}"
        return config

    EngineArgs.create_engine_config = create_for_rank
