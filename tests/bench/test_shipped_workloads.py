"""What every shipped workload promises: enough requests behind each bar."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmc.bench.data import FILES, data_folder
from lmc.bench.expected import expected_hits
from lmc.bench.prompts import build_prompts
from lmc.bench.schedule import make_plan
from lmc.bench.tokenizer import ModelTokenizer
from lmc.bench.workload import load_workload
from lmc.model import EMBEDDED, cache_home, resolve_tokenizer_folder

FOLDER = Path(__file__).parents[2] / "workloads"
WITH_BARS = sorted(path.stem for path in FOLDER.glob("*.yaml") if "\nbars:" in path.read_text())


@pytest.mark.data
@pytest.mark.parametrize(("quick", "fewest"), [(False, 12), (True, 6)], ids=["full", "quick"])
@pytest.mark.parametrize("name", WITH_BARS)
def test_no_bar_rests_on_few_requests(name: str, quick: bool, fewest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    file = FOLDER / f"{name}.yaml"
    needed = [data for data in FILES.values() if f"$LMC_DATA_DIR/{data.file}" in file.read_text()]
    for folder in (data_folder(), cache_home() / "data"):  # `lmc data fetch` without LMC_DATA_DIR fills the second
        if all((folder / data.file).is_file() for data in needed):
            monkeypatch.setenv("LMC_DATA_DIR", str(folder))
            break
    else:
        names = ", ".join(data.file for data in needed)
        pytest.skip(f"{names} is not in {data_folder()}; `lmc data list` says how it is had")
    workload = load_workload(file, quick)
    prompts = build_prompts(workload, ModelTokenizer.load(resolve_tokenizer_folder(EMBEDDED)), FOLDER)
    requests = [item.request for item in make_plan(prompts.sessions, workload).items]
    hits = expected_hits(requests, 128)
    for bar in workload.bars:
        sides = [bar.over] if bar.against is None else [bar.over, bar.against]
        for over in sides:
            chosen = [
                request
                for request, hit in zip(requests, hits, strict=True)
                if over in ("all", request.part) or (over == "hits" and hit)
            ]
            assert len(chosen) >= fewest, f"{bar}: only {len(chosen)} requests"
            assert len({request.session_id for request in chosen}) >= 6, f"{bar}: no interval from so few sessions"
