"""Whatever a client may send along with a request, as hypothesis makes it up, and the log lines that come of it."""

from __future__ import annotations

import json
import logging
import string
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import Phase
from hypothesis import strategies as st

QUICK = (Phase.explicit, Phase.generate)  # 20 inputs at a time take too long to shrink


@contextmanager
def logged() -> Iterator[list[str]]:
    """The lines that lmc logs meanwhile, as they stand in a log."""
    handler, ours = _Lines(), logging.getLogger("lmc")
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours.addHandler(handler)
    try:
        yield handler.lines
    finally:
        ours.removeHandler(handler)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


def is_short_and_clean(line: str) -> bool:
    return len(line) < 400 and set(line) <= set(string.printable) - set("\n\r\t\v\f")


ANY_TEXT = st.text(st.characters(), max_size=12)  # surrogates, controls, whatever there is
LONG_TEXT = st.builds(lambda text, times: text * times, ANY_TEXT, st.sampled_from([1, 30, 60]))
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(), LONG_TEXT, st.binary(max_size=4)
)
DEEP = st.builds(lambda depth: json.loads("[" * depth + "]" * depth), st.integers(1, 100))
ANYTHING = st.one_of(
    LEAVES, DEEP, st.lists(LEAVES, max_size=3), st.dictionaries(st.one_of(ANY_TEXT, st.integers()), LEAVES, max_size=3)
)
KEYS = st.one_of(
    st.sampled_from(["bypass", "store", "tenant", "pin_seconds", "explain", "token"]), ANY_TEXT, st.integers()
)
PLAUSIBLE = st.fixed_dictionaries(
    {},
    optional={
        "bypass": st.booleans(),
        "store": st.booleans(),
        "explain": st.booleans(),
        "tenant": ANY_TEXT,
        "pin_seconds": st.floats(0, 1e9) | st.integers(0, 10**9),
        "token": st.sampled_from(["open sesame", "\ud800", ""]),
    },
)
WISHES = st.one_of(ANYTHING, PLAUSIBLE, st.dictionaries(KEYS, ANYTHING, max_size=3))
PARAMETERS = st.one_of(ANYTHING, st.builds(lambda wishes: {"lmc": wishes, "other": 1}, WISHES))
