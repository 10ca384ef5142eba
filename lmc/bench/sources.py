"""Reads rows and documents for workloads through `datasets` in streaming mode, so that nothing is copied into a cache.

JSON lines are read as text and parsed here, because real tool schemas do not fit one Arrow type.
"""

from __future__ import annotations

import importlib.util
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from lmc.bench.data import FILES, data_folder
from lmc.bench.workload import FileSource, HubSource, PackageSource
from lmc.errors import WorkloadError

Row = dict[str, Any]  # Any: one row of somebody's data set


def read_rows(source: FileSource | PackageSource | HubSource, base: Path) -> Iterator[Row]:
    """The rows of a source, in file order. Raises WorkloadError with file and line."""
    if isinstance(source, HubSource):
        yield from _hub_rows(source, base)
        return
    with tempfile.TemporaryDirectory(prefix="lmc-bench-") as scratch:
        path = locate(source, base, Path(scratch))
        for row in _file_rows(path, source.format):
            yield from _explode(row, source.explode, str(path))


def read_text(source: FileSource | PackageSource | HubSource, base: Path) -> str:
    """A whole text document. Raises WorkloadError."""
    return "".join(str(row["text"]) for row in read_rows(source, base))


def locate(source: FileSource | PackageSource, base: Path, scratch: Path) -> Path:
    """The path of the source's file; a member of an archive is unpacked into `scratch`. Raises WorkloadError."""
    if isinstance(source, PackageSource):
        spec = importlib.util.find_spec(source.package)
        if spec is None or not spec.submodule_search_locations:
            raise WorkloadError(
                f"package {source.package!r} is not installed; install it, because the workload reads its file {source.path}"
            )
        return _existing(Path(spec.submodule_search_locations[0]) / source.path)
    archive = find_file(source.path, base)
    if source.member is None:
        return archive
    try:
        with tarfile.open(archive) as tar:
            tar.extract(source.member, scratch, filter="data")
    except (KeyError, tarfile.TarError, OSError) as error:
        raise WorkloadError(f"{archive}: cannot unpack member {source.member!r}: {error}") from error
    return scratch / source.member


def find_file(text: str, base: Path) -> Path:
    """The file that a workload names by this text: variables are expanded, and the path starts at `base`. Raises WorkloadError."""
    expanded = os.path.expandvars(text.replace("$LMC_DATA_DIR", str(data_folder())))
    if "$" in expanded:
        name = expanded[expanded.index("$") :].split("/")[0]
        raise WorkloadError(f"{text}: the environment variable {name} is not set; set it to the folder with the data")
    path = base / Path(expanded).expanduser()
    known = next((data.name for data in FILES.values() if data.file == path.name), None)
    if known is not None and not path.is_file():
        raise WorkloadError(f"{path}: no such data file; `lmc data fetch {known}` gets it, or says where it comes from")
    return _existing(path)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise WorkloadError(f"{path}: no such data file; correct the path in the workload")
    return path


def _file_rows(path: Path, kind: str) -> Iterator[Row]:
    if kind in ("csv", "parquet"):
        yield from _stream(kind, path)
        return
    by = "line" if kind == "jsonl" else "document"
    for number, row in enumerate(_stream("text", path, sample_by=by), start=1):
        text = row["text"]
        if kind == "text":
            yield {"text": text}
            continue
        if not text.strip():
            continue
        try:
            value = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise WorkloadError(f"{path}:{number}: not JSON: {error}") from error
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, dict):
                raise WorkloadError(f"{path}:{number}: the row is a JSON {type(item).__name__}; it must be an object")
            yield item


def _stream(builder: str, path: Path, **options: str) -> Iterator[Row]:
    import datasets

    try:
        yield from datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise WorkloadError(f"{path}: cannot read as {builder}: {error}") from error


def _hub_rows(source: HubSource, base: Path) -> Iterator[Row]:
    import datasets

    folder = base / Path(os.path.expandvars(source.dataset)).expanduser()
    name = str(folder) if folder.is_dir() else source.dataset
    try:
        yield from datasets.load_dataset(name, source.config, split=source.split, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        problem = f"data set {source.dataset}: {' '.join(str(error).split())}"
        if isinstance(error, ConnectionError):
            problem += "; without a network give the folder of a copy (hf download --repo-type dataset) as `dataset`"
        raise WorkloadError(problem) from error


def _explode(row: Row, steps: list[str], where: str) -> Iterator[Row]:
    """Walk nested lists: with steps [a, b] every element of row["a"][i]["b"] becomes a row {"a": ..., "b": ...}."""
    if not steps:
        yield row
        return
    first, *rest = steps
    items = row.get(first)
    if not isinstance(items, list):
        raise WorkloadError(f"{where}: explode: the row has no list {first!r}; name one that it has")
    for item in items:
        if not rest:
            yield {first: item}
            continue
        for inner in _explode(item, rest, where):
            yield {first: item, **inner}
