"""vLLM's KV connector, out of tree: --kv-transfer-config with kv_connector LmcConnector and kv_connector_module_path this module.

vLLM makes one object in the scheduler process (it holds the CacheScheduler) and one in each worker process (it holds a CacheWorker). The
worker introduces itself through the handshake metadata, plans travel in the connector metadata, reports in the worker metadata.

A request is looked up in memory. Chunks on lower tiers are first staged into host slots while the answer is "ask again"; what is promised
lies in host memory and is copied before the forward pass. So no block is ever written by a thread that could be late.
"""

from lmc.cache.connectors.vllm.connector import LmcConnector

__all__ = ["LmcConnector"]
