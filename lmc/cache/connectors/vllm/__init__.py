"""vLLM's KV connector, out of tree: --kv-transfer-config with kv_connector LmcConnector and kv_connector_module_path this module.

vLLM makes one object in the scheduler process (it holds the CacheScheduler) and one in each worker process (it holds a CacheWorker). The
worker introduces itself through the handshake metadata, plans travel in the connector metadata, reports in the worker metadata.

Lookups read memory only. Chunks in lower tiers are first staged into host slots while the answer is "ask again", so what is promised lies
in host memory. Small hits are copied into the engine's blocks before the forward pass, or layer by layer during it. Large hits are copied
in the background, by a thread or a stream, while the request waits outside the batch; it joins the batch after the copy was reported.
"""

from lmc.cache.connectors.vllm.connector import LmcConnector

__all__ = ["LmcConnector"]
