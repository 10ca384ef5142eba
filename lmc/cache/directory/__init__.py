"""The directory: which chunk is in which tier and slot, what holds it there, and what is evicted next. Start with directory.py."""

from __future__ import annotations

from lmc.cache.directory.below import Counts
from lmc.cache.directory.build import build_directory, capacity_of
from lmc.cache.directory.changes import Change
from lmc.cache.directory.directory import Directory, Found
from lmc.cache.directory.holds import Ticket
from lmc.cache.directory.misses import Miss, evicted_from
from lmc.cache.directory.nodes import Capacity
from lmc.cache.directory.offer import store_offer, use_prefix
from lmc.cache.directory.places import HOST
from lmc.cache.directory.request import Request
from lmc.cache.directory.told import NOTHING_TOLD, Told, tell

__all__ = [
    "HOST",
    "NOTHING_TOLD",
    "Capacity",
    "Change",
    "Counts",
    "Directory",
    "Found",
    "Miss",
    "Request",
    "Ticket",
    "Told",
    "build_directory",
    "capacity_of",
    "evicted_from",
    "store_offer",
    "tell",
    "use_prefix",
]
