"""The backend in use: it chooses the fastest available backend for each batch, and counts the choices. The last one accepts every batch."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping

from lmc.cache.transfer.backends.base import Backend
from lmc.cache.transfer.cost import CostModel
from lmc.cache.transfer.planner import Descriptors
from lmc.errors import TransferError

logger = logging.getLogger(__name__)


class AutoBackend:
    name = "auto"

    def __init__(
        self,
        backends: Mapping[str, Backend],
        model: CostModel | None,
        run_now: Callable[[Callable[[int], None]], None],
        *,
        forced: str = "",
        threads: int = 1,
    ) -> None:
        """run_now calls with the handle of a stream behind the compute stream and waits for it; forced is the name to prefer always.

        Without a model the first backend serves whatever it accepts. threads: of the CPU that share a large batch out, for metrics.
        """
        self._backends = dict(backends)
        self._model = model
        self._run_now = run_now
        self._forced = forced
        self.threads = threads
        # For metrics: (backend, direction) -> batches, and "backend: reason" -> batches.
        self.chosen: Counter[tuple[str, str]] = Counter()
        self.refused: Counter[str] = Counter()

    def refuses(self, descriptors: Descriptors) -> str:
        return "" if self._accepting(descriptors) else "no backend takes these copies"

    def execute(self, descriptors: Descriptors, stream: int = 0) -> None:
        """Copy with the chosen backend. Without a stream it returns when the bytes are in place."""
        if len(descriptors) == 0:
            return
        backend = self.choose(descriptors)
        self.chosen[backend.name, str(descriptors.direction)] += 1
        if stream:
            backend.execute(descriptors, stream)
        else:
            self._run_now(lambda handle: backend.execute(descriptors, handle))

    def choose(self, descriptors: Descriptors) -> Backend:
        """Choose a backend. Raises TransferError if no backend accepts the copies."""
        names = self._accepting(descriptors)
        if not names:
            raise TransferError("no transfer backend takes these copies: " + "; ".join(self.refused))
        if self._forced in names:
            return self._backends[self._forced]
        if self._model is None:
            return self._backends[names[0]]
        return self._backends[self._model.fastest(names, descriptors)]

    def _accepting(self, descriptors: Descriptors) -> list[str]:
        names = []
        for name, backend in self._backends.items():
            reason = backend.refuses(descriptors)
            if not reason:
                names.append(name)
                continue
            key = f"{name}: {reason}"
            if key not in self.refused:
                logger.info("lmc: transfer: %s; another backend copies", key)
            self.refused[key] += 1
        return names


def at_once(copy: Callable[[int], None]) -> None:
    """For AutoBackend's run_now in CPU memory: there is no stream to wait for."""
    copy(0)
