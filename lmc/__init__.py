"""lmc: a KV cache for LLM serving engines, with its simulator and its benchmark."""

__version__ = "0.1.0"
DISTRIBUTION = "lmc-kv"  # the package called lmc on PyPI is another project
