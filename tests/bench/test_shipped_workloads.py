"""What every shipped workload promises: enough requests behind each bar."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lmc.bench.expected import expected_hits
from lmc.bench.prompts import build_prompts
from lmc.bench.schedule import make_plan
from lmc.bench.tokenizer import ModelTokenizer
from lmc.bench.workload import load_workload
from lmc.model import EMBEDDED, resolve_tokenizer_folder

FOLDER = Path(__file__).parents[2] / "workloads"
WITH_BARS = sorted(path.stem for path in FOLDER.glob("*.yaml") if "\nbars:" in path.read_text())


@pytest.mark.data
@pytest.mark.parametrize(("quick", "fewest"), [(False, 12), (True, 6)], ids=["full", "quick"])
@pytest.mark.parametrize("name", WITH_BARS)
def test_no_bar_rests_on_few_requests(name: str, quick: bool, fewest: int) -> None:
    file = FOLDER / f"{name}.yaml"
    if "LMC_DATA_DIR" in file.read_text() and "LMC_DATA_DIR" not in os.environ:
        pytest.skip("LMC_DATA_DIR is not set")
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
