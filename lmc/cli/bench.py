"""lmc bench: replay a workload against live engines, arm against arm."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmc.cli.default_command import DefaultCommandGroup

if TYPE_CHECKING:
    from lmc.bench.progress import Progress
    from lmc.bench.records import Results

app = typer.Typer(
    cls=DefaultCommandGroup,
    help="Replay a workload against live engines, arm against arm: time to first token, hits, verdicts.",
    no_args_is_help=True,
)


def add_to(parent: typer.Typer) -> None:
    parent.add_typer(app, name="bench")


@app.command()
def run(
    workload: Annotated[Path, typer.Argument(help="Workload file (YAML).")],
    out: Annotated[Path | None, typer.Option(help="Folder for the report; default reports/NAME.")] = None,
    model: Annotated[str | None, typer.Option(help="Model instead of the workload's.")] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Run only this arm; may be given several times.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The workload's small size.")] = False,
    repeat: Annotated[int, typer.Option(min=1, help="Run every arm so often, each time with a new engine.")] = 1,
    scratch: Annotated[Path | None, typer.Option(help="Keep logs and disk tiers in this folder.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no tables; the exit code tells.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Results as JSON on stdout, progress as JSON lines on stderr.")
    ] = False,
) -> None:
    """Replay WORKLOAD in every arm and write the report."""
    from lmc.bench.progress import JsonLines, Live, Quiet
    from lmc.bench.records import write_results
    from lmc.bench.render import write_report
    from lmc.bench.run import RunOptions, run_workload
    from lmc.bench.workload import load_workload

    plan = load_workload(workload, quick)
    folder = out or Path("reports") / plan.name
    name, model_folder = _model(model or plan.model)

    def options(progress: Progress) -> RunOptions:
        return RunOptions(workload.parent, name, model_folder, arm or [], repeat, scratch=scratch, progress=progress)

    if quiet or as_json:
        results, records = run_workload(plan, options(JsonLines() if as_json else Quiet()))
    else:
        with Live() as live:
            results, records = run_workload(plan, options(live))
    write_results(folder, results, records)
    write_report(folder, results, records)
    if as_json:
        typer.echo((folder / "results.json").read_text())
    elif not quiet:
        _show(results, folder)
    if not results.valid:
        raise typer.Exit(1)


@app.command()
def check(
    workload: Annotated[Path, typer.Argument(help="Workload file (YAML).")],
    model: Annotated[str | None, typer.Option(help="Model instead of the workload's.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The workload's small size.")] = False,
) -> None:
    """Check WORKLOAD without an engine: schema, data, prompts, and the hits to expect."""
    from lmc.bench.check import check_workload
    from lmc.bench.workload import load_workload
    from lmc.report import print_table

    plan = load_workload(workload, quick)
    _, model_folder = _model(model or plan.model)
    for table in check_workload(plan, model_folder, workload.parent):
        print_table(table)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder with results.json and requests.parquet.")]) -> None:
    """Render the report of an earlier run again."""
    from lmc.bench.records import read_records, read_results
    from lmc.bench.render import write_report

    write_report(folder, read_results(folder), read_records(folder))
    typer.echo(f"report: {folder / 'report.html'}")


def _show(results: Results, folder: Path) -> None:
    from lmc.bench.render import bars_table, brief_table, hits_table, outputs_table
    from lmc.report import print_table

    for table in (brief_table(results), hits_table(results), bars_table(results), outputs_table(results)):
        if table.rows:
            print_table(table)
    for problem in results.problems:
        typer.echo(f"INVALID: {problem}", err=True)
    typer.echo(f"report: {folder / 'report.html'}")


def _model(name: str | None) -> tuple[str, Path]:
    from lmc.model import EMBEDDED, resolve_model

    return name or EMBEDDED, resolve_model(name or EMBEDDED)
