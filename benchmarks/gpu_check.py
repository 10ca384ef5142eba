"""What only a device can tell of lmc, in under ten minutes and without an engine: python -m benchmarks.gpu_check [--out reports/gpu-NAME].

It needs torch, Triton and what the cache itself needs. Each section (benchmarks/gpu_sections.py) runs in a process of its own with its own
limit, so that a crash or a hang costs only itself. --dry goes through all of it on a machine without a GPU, and measures nothing.
Exit code 1 when a section fails or finds something wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lmc.bench.machine import describe_hardware, describe_software
from lmc.report import Cell, Column, Report, Section, Table, report_html, report_markdown, to_json, write_file

BUDGET_S = 560.0
LEAST_S = 15.0  # a section is not begun with less
MARK = "FINDING "


@dataclass
class Outcome:
    section: str
    question: str
    seconds: float = 0.0
    failure: str = ""
    findings: list[dict[str, Cell]] = field(default_factory=list)
    expected_wrong: bool = False  # it shows what would be without a mend

    @property
    def right(self) -> bool:
        return not self.failure and (self.expected_wrong or all(finding.get("ok", True) for finding in self.findings))


def run_section(name: str, dry: bool) -> None:
    """In the section's own process: findings go out line by line, so that those before a crash are kept."""
    from benchmarks.gpu_sections import SECTIONS

    section = next(function for one, _, function in SECTIONS if one == name)
    for finding in section(dry):
        print(MARK + json.dumps(finding, default=str), flush=True)


def run_apart(outcome: Outcome, limit: float, dry: bool) -> str:
    """Fills the outcome in; returns the log."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--section", outcome.section, *(["--dry"] if dry else [])]
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # what it starts ends with it
    )
    try:
        log = process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        log = process.communicate()[0]
        outcome.failure = f"killed after {limit:.0f} s"
    outcome.seconds = time.monotonic() - started
    lines = log.splitlines()
    outcome.findings = [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]
    if not outcome.failure and process.returncode != 0:
        last = next((line for line in reversed(lines) if line.strip()), "nothing was printed")
        outcome.failure = f"exit code {process.returncode}: {last}"
    elif not outcome.failure and not outcome.findings:
        outcome.failure = "it found nothing"
    return log


def table_of(outcome: Outcome) -> Table:
    names = list(dict.fromkeys(name for finding in outcome.findings for name in finding))
    rows = [[finding.get(name) for name in names] for finding in outcome.findings]
    return Table(outcome.section, [Column(name) for name in names], rows)


def report_of(outcomes: Sequence[Outcome], dry: bool) -> Report:
    wrong = [outcome.section for outcome in outcomes if not outcome.right]
    summary = f"{len(outcomes) - len(wrong)} of {len(outcomes)} sections are as they should be"
    summary += f"; not {', '.join(wrong)}." if wrong else "."
    if dry:
        summary += " A dry run: no GPU was at hand, threads stood for streams, and no figure here says anything."
    sections = []
    for outcome in outcomes:
        text = f"{outcome.question} ({outcome.seconds:.0f} s)" + (
            f" FAILED: {outcome.failure}" if outcome.failure else ""
        )
        sections.append(Section(outcome.section, text, [table_of(outcome)] if outcome.findings else []))
    metadata = {**describe_hardware(), **describe_software()}
    return Report("GPU check" + (", dry" if dry else ""), summary, sections, metadata)


def check(names: Sequence[str], dry: bool, out: Path | None) -> int:
    from benchmarks.gpu_sections import SECTIONS

    started = time.monotonic()
    outcomes, logs = [], []
    for name, limit, function in SECTIONS:
        if names and name not in names:
            continue
        documented = getattr(function, "func", function)
        outcome = Outcome(name, (documented.__doc__ or "").strip(), expected_wrong=name == "capture-not-relaxed")
        left = BUDGET_S - (time.monotonic() - started)
        if left < LEAST_S:
            outcome.failure = "no time was left"
        else:
            logs.append(f"===== {name}\n{run_apart(outcome, min(limit, left), dry)}")
        outcomes.append(outcome)
        verdict = "right" if outcome.right else outcome.failure or "wrong"
        print(f"{name}: {verdict}, {len(outcome.findings)} findings, {outcome.seconds:.0f} s", flush=True)
        if out is not None:  # after each section: the machine may be taken away
            report = report_of(outcomes, dry)
            write_file(
                out / "results.json",
                to_json({"dry": dry, "sections": [asdict(one) for one in outcomes], "made": report.metadata}),
            )
            write_file(out / "report.md", report_markdown(report))
            write_file(out / "report.html", report_html(report))
            write_file(out / "log.txt", "\n".join(logs))
    return 0 if all(outcome.right for outcome in outcomes) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="SECTION", help="only these")
    parser.add_argument("--out", type=Path, help="the report's folder, such as reports/gpu-h100")
    parser.add_argument("--dry", action="store_true", help="without a GPU, as far as it goes")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.section:
        run_section(options.section, options.dry)
        sys.stdout.flush()
        os._exit(0)  # threads of a section may hang on a device that failed
    return check(options.names, options.dry, options.out)


if __name__ == "__main__":
    sys.exit(main())
