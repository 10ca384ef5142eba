"""Runs independent jobs: in this process, in several, or on a Ray cluster. The results are the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from lmc.errors import ConfigError, RunError

J = TypeVar("J")
R = TypeVar("R")
LOCAL = "local"  # the address of a Ray instance that is started here and ends with the run


def run_jobs(
    function: Callable[[J], R], jobs: Sequence[J], workers: int | None = None, ray: str | None = None
) -> Iterator[tuple[int, R]]:
    """Yields (number of the job, its result) as they end.

    workers: jobs at the same time, by default one per core. ray: address of a cluster. The function and the jobs must be importable and
    picklable. Raises RunError when a worker dies.
    """
    if ray is not None:
        return _on_ray(function, jobs, ray, workers)
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        return ((number, function(job)) for number, job in enumerate(jobs))
    return _in_processes(function, jobs, workers)


def _in_processes(function: Callable[[J], R], jobs: Sequence[J], workers: int) -> Iterator[tuple[int, R]]:
    context = multiprocessing.get_context("spawn")  # Numba's threads do not survive a fork
    pool = ProcessPoolExecutor(workers, context, initializer=_begin_worker)
    try:
        numbers = {pool.submit(function, job): number for number, job in enumerate(jobs)}
        for future in as_completed(numbers):
            yield numbers[future], future.result()
    except BrokenProcessPool:
        raise _died() from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """An interrupt is for the parent, and a worker ends with it, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _on_ray(
    function: Callable[[J], R], jobs: Sequence[J], address: str, workers: int | None
) -> Iterator[tuple[int, R]]:
    try:
        import ray
    except ImportError:
        raise ConfigError("--ray needs Ray, which is not installed here; run pip install 'lmc-kv[ray]'") from None
    options: dict[str, Any] = {}  # Any: those of ray.init
    if address == LOCAL:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what starts here tells nobody
        options = {"include_dashboard": False, "num_cpus": workers}
    try:
        ray.init(address=address, log_to_driver=False, **options)
    except ConnectionError as error:
        raise ConfigError(f"no Ray cluster answers at {address} ({error}); start it, or give its address") from None
    try:
        at_once = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        task = ray.remote(function)
        waiting = iter(enumerate(jobs))
        running: dict[Any, int] = {}  # Any: Ray's references
        while True:
            for number, job in waiting:
                running[task.remote(job)] = number
                if len(running) >= at_once:
                    break
            if not running:
                return
            for reference in ray.wait(list(running))[0]:
                yield running.pop(reference), ray.get(reference)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError):
        raise _died() from None
    finally:
        ray.shutdown()


def _died() -> RunError:
    return RunError(
        "a worker died, perhaps for lack of memory; run the same command again with fewer --workers: it goes on where it stopped"
    )
