"""Format of lmc's log lines (the engine's, or one JSON object per line with the facts as fields), and a limit for repeated lines."""

from __future__ import annotations

import datetime
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Hashable
from typing import Literal

LogFormat = Literal["text", "json"]


class JsonFormatter(logging.Formatter):
    """Formats a log record as a JSON object. Pass facts as logger.warning(..., extra=facts(tier="disk"))."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage().removeprefix("lmc: "),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def facts(**values: object) -> dict[str, object]:
    """The `extra` argument of a log call with these facts."""
    return {"facts": values}


def use_format(kind: LogFormat) -> None:
    """Write lmc's lines as JSON to standard error. "text" leaves them to the engine's logging."""
    if kind == "text":
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    ours = logging.getLogger("lmc")
    ours.handlers = [handler]
    ours.setLevel(logging.INFO)
    ours.propagate = False


class Sparingly:
    """Logs each kind of line at most once per interval, with the number of lines left out. Safe for several threads."""

    def __init__(self, seconds: float = 10.0, now: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._now = now
        self._lock = threading.Lock()
        self._said: dict[Hashable, tuple[float, int]] = {}  # kind -> time of the last line, lines held back since

    def warn(self, logger: logging.Logger, kind: Hashable, text: str, **about: object) -> None:
        """Log a warning with its facts, unless one of this kind was logged within the interval."""
        with self._lock:
            last, count = self._said.get(kind, (float("-inf"), 0))
            silent = self._now() - last < self._seconds
            self._said[kind] = (last, count + 1) if silent else (self._now(), 0)
        if not silent:
            more = f" ({count} more since the last such line)" if count else ""
            logger.warning("lmc: %s%s", text, more, extra=facts(**about, held_back=count))
