"""Eviction policies, one per file. Each is written once: the directory interprets it, the simulator compiles it."""

from lmc.cache.policy.registry import POLICIES, get_policy

__all__ = ["POLICIES", "get_policy"]
