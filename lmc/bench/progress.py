"""Reports the progress of a run: as a live display, not at all, or as one JSON object per event."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

import orjson

from lmc.bench.client import Outcome

if TYPE_CHECKING:
    from rich.progress import TaskID


class Progress(Protocol):
    def phase(self, arm: str, name: str, detail: str = "") -> None:
        """An arm enters a phase, or has news about it."""

    def load(self, arm: str, total: int) -> None:
        """The measured load of an arm begins."""

    def request(self, arm: str, outcome: Outcome) -> None:
        """A request of the measured load ended."""


class Quiet:
    def phase(self, arm: str, name: str, detail: str = "") -> None:
        pass

    def load(self, arm: str, total: int) -> None:
        pass

    def request(self, arm: str, outcome: Outcome) -> None:
        pass


class JsonLines:
    """Writes one object per line on standard error, for CI."""

    def phase(self, arm: str, name: str, detail: str = "") -> None:
        self._write({"event": "phase", "arm": arm, "phase": name, "detail": detail})

    def load(self, arm: str, total: int) -> None:
        self._write({"event": "load", "arm": arm, "requests": total})

    def request(self, arm: str, outcome: Outcome) -> None:
        self._write({"event": "request", "arm": arm, "id": outcome.request.id, "status": outcome.status})

    def _write(self, event: dict[str, object]) -> None:
        sys.stderr.write(orjson.dumps(event).decode() + "\n")
        sys.stderr.flush()


class Live:
    """Shows a bar per arm, with the last TTFT and the number of cached tokens."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Live:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def phase(self, arm: str, name: str, detail: str = "") -> None:
        self._bars.update(self._task(arm), note=f"{name} {detail}".strip(), refresh=True)

    def load(self, arm: str, total: int) -> None:
        self._bars.update(self._task(arm), total=total, note="measure")

    def request(self, arm: str, outcome: Outcome) -> None:
        note = outcome.status
        if outcome.first_s is not None:
            cached = f", {outcome.cached_tokens:,} cached" if outcome.cached_tokens else ""
            ttft_ms = (outcome.first_s - outcome.intended_s) * 1e3
            note = f"{outcome.request.id}: TTFT {ttft_ms:,.0f} ms, {len(outcome.request.prompt):,} tokens{cached}"
        self._bars.update(self._task(arm), advance=1, note=note)

    def _task(self, arm: str) -> TaskID:
        if arm not in self._tasks:
            self._tasks[arm] = self._bars.add_task(arm, total=None, note="")
        return self._tasks[arm]
