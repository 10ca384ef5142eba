"""Raises one exception inside lmc, at a chosen function, while an engine's call of a guarded method is under way."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType

import lmc
from lmc.cache.connectors import guard

ERRORS: tuple[Exception, ...] = (
    OSError(28, "No space left on device"),
    MemoryError("injected"),
    RecursionError("injected"),
    ValueError("injected"),
    RuntimeError("can't start new thread"),
)
_OURS = str(Path(lmc.__file__).parent)
_GUARD = guard.__file__


@dataclass
class Injection:
    """Of the calls of `function` inside the guarded method `hook`, the one with this number raises; without a hook none does."""

    hook: str = ""
    function: str = ""
    error: Exception | None = None
    number: int = 1
    closing_too: bool = False  # then the first call that closes the cache after it raises, too
    raised: int = 0
    seen: Counter[tuple[str, str]] = field(default_factory=Counter)  # (hook, function) -> calls
    _known: dict[CodeType, bool] = field(default_factory=dict)

    @contextmanager
    def armed(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            yield
        finally:
            sys.settrace(before)

    def _trace(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        ours = self._known.get(code)
        if ours is None:
            ours = code.co_filename.startswith(_OURS) and code.co_filename != _GUARD and "<lambda>" not in code.co_name
            self._known[code] = ours
        if not ours or event != "call":
            return
        hook, ends = _guarded_method(frame)
        if not hook:
            return
        if self.raised:
            if ends and self.closing_too and self.raised == 1:
                self.raised = 2
                raise ZeroDivisionError("injected into the end of the cache")
            return
        name = code.co_qualname
        self.seen[hook, name] += 1
        if (
            self.error is not None
            and (hook, name) == (self.hook, self.function)
            and self.seen[hook, name] == self.number
        ):
            self.raised = 1
            error, again = self.error, self._trace
            sys.settrace(None)
            if self.closing_too:
                sys.settrace(again)
            raise error


def _guarded_method(frame: FrameType) -> tuple[str, bool]:
    """The innermost guarded method that this frame is part of, and whether its cache is being ended."""
    ends, walked = False, frame.f_back
    while walked is not None:
        code = walked.f_code
        if code.co_filename == _GUARD:
            if code.co_name == "contain":
                ends = True
            elif code.co_name == "call":
                method = walked.f_locals.get("method") or walked.f_locals["function"]
                return str(method.__qualname__), ends
        walked = walked.f_back
    return "", False
