"""lmc: a KV cache for LLM serving engines, with its simulator and its benchmark."""

__version__ = "0.1.0"
