"""What clients say of their requests beside the prompt: a class, from which policies may learn, and a session, for the record."""

from __future__ import annotations

from typing import NamedTuple

from lmc.cache.policy.base import MOST_CLASSES


class Told(NamedTuple):
    """Nothing of it is part of a chunk's name."""

    class_number: int = 0  # for the policy; 0: no class
    class_name: str = ""
    session: str = ""


NOTHING_TOLD = Told()


def tell(known: dict[str, int], request_class: str, session: str) -> Told:
    """The class gets the next number of those known, 1 for the first. The last number stands for all further classes."""
    if request_class and len(known) < MOST_CLASSES:
        known.setdefault(request_class, len(known) + 1)
    number = known.get(request_class, MOST_CLASSES) if request_class else 0
    return Told(number, request_class, session)
