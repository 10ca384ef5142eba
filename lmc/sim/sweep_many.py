"""A sweep over many traces: makes the jobs, runs those that are not done yet, shows the progress, and keeps the results."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lmc.sim.capacity import CapacityOptions
from lmc.sim.policies import check_policies
from lmc.sim.sweep_jobs import Row, make_jobs, run_job
from lmc.sim.sweep_results import Results
from lmc.sim.sweep_workers import run_jobs
from lmc.sim.trace import Window
from lmc.sim.trace_file import TraceFile


@dataclass(frozen=True)
class Swept:
    rows: list[Row]  # in the order trace, chunk size, policy, capacity
    failures: tuple[str, ...]  # what was wrong with some of the traces


def sweep_many(
    traces: Iterable[TraceFile],
    policies: Sequence[str],
    capacities: CapacityOptions,
    path: Path,
    chunk_sizes: Sequence[int] = (),
    window: Window = "all",
    workers: int | None = None,
    ray: str | None = None,
) -> Swept:
    """Write a Parquet file with one row for each trace, chunk size, policy and capacity. A job that fails has no row.

    workers and ray are those of run_jobs(). Raises ConfigError, TraceError for a file of no known format, RunError when a worker dies.
    """
    check_policies(policies)
    jobs = list({job.key: job for job in make_jobs(traces, policies, capacities, chunk_sizes, window)}.values())
    failures: list[str] = []
    with Results(path, [job.key for job in jobs]) as results:
        waiting = [job for job in jobs if job.key not in results.rows]
        with _bar() as bar:
            task = bar.add_task("sweep", total=len(jobs), completed=len(jobs) - len(waiting))
            for _, result in run_jobs(run_job, waiting, workers, ray):
                if isinstance(result, str):
                    failures.append(result)
                else:
                    results.add(result)
                bar.advance(task)
        done = [job.key for job in jobs if job.key in results.rows]
        results.finish(done)
        return Swept([results.rows[key] for key in done], tuple(dict.fromkeys(failures)))


def _bar() -> Progress:
    """A bar on standard error, if that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=not sys.stderr.isatty())
