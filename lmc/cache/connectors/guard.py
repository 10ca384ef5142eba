"""Keeps a fault inside lmc: an exception that left a call would end the engine, so here it ends the cache.

Every method that an engine calls is guarded. What the guard answers instead must hold the engine's view together: loads that were promised
are reported as failed, and nothing waits for a copy that nobody makes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol, TypeVar, cast

logger = logging.getLogger(__name__)

Call = TypeVar("Call", bound=Callable[..., Any])


class HoldsCache(Protocol):
    @property
    def strict(self) -> bool:
        """An engine that cannot have its cache shall not start."""

    def end_cache(self) -> None:
        """Close the cache and go on without it. Called after a fault, possibly more than once."""


def guarded(instead: Callable[..., Any], *, at_start: bool = False) -> Callable[[Call], Call]:
    """Decorates a HoldsCache's method that an engine calls. instead: makes the answer of an engine without a cache from the same arguments.

    at_start: the engine does not serve yet, so strict settings let the error through.
    """

    def guard(method: Call) -> Call:
        @wraps(method)
        def call(self: HoldsCache, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except Exception as error:
                if at_start and self.strict:
                    raise
                complain("fault in the cache; the engine goes on WITHOUT it", error)
                contain(self.end_cache)
                return instead(self, *args, **kwargs)

        return cast(Call, call)

    return guard


def answered(instead: Callable[..., Any]) -> Callable[[Call], Call]:
    """The same for a function that has no cache to end, such as one of an API server's process."""

    def guard(function: Call) -> Call:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except Exception as error:  # noqa: BLE001  as above
                complain(f"{function.__qualname__} failed; the engine goes on without its answer", error)
                return instead(*args, **kwargs)

        return cast(Call, call)

    return guard


def contain(step: Callable[[], object]) -> None:
    """Call it; an exception is logged and ends here."""
    try:
        step()
    except Exception as error:  # noqa: BLE001  as above
        complain("the cache could not be closed in order", error)


def complain(text: str, error: Exception) -> None:
    with contextlib.suppress(Exception):  # a log handler may lack memory or stack, too
        logger.error("lmc: %s", text, exc_info=error)
