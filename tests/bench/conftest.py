"""A tiny byte-level tokenizer, workloads as dictionaries, and runs against the mock server."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lmc.bench.records import RequestRecord, Results
from lmc.bench.run import RunOptions, run_workload
from lmc.bench.tokenizer import ModelTokenizer
from lmc.bench.workload import Workload, load_workload

MOCK = (sys.executable, str(Path(__file__).with_name("mock_server.py")))
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> ModelTokenizer:
    return ModelTokenizer.load(model_folder)


def small_workload(**changes: Any) -> dict[str, Any]:
    """Two groups of chats over a long shared system prompt, a repeat and a random part; four arms."""
    document: dict[str, Any] = {
        "name": "small",
        "parts": {
            "chat": {
                "source": {"kind": "file", "path": "rows.jsonl"},
                "group_by": "row.group",
                "session": {"system": "{{ row.policy }}", "turns": "row.turns"},
                "pick": {"groups": 2, "per_group": 3},
                "output_tokens": 4,
            },
            "again": {"source": {"kind": "repeat", "part": "chat"}, "pick": {"sessions": 2}, "output_tokens": 4},
            "random": {"source": {"kind": "random", "tokens": 300}, "pick": {"sessions": 3}, "output_tokens": 4},
        },
        "warm_up": {"requests": 1, "tokens": 200},
        "arms": {
            "none": {"reuse": "none", "args": ["--no-enable-prefix-caching"]},
            "engine": {"reuse": "engine", "args": ["--enable-prefix-caching"]},
            "lmc": {"reuse": "cache", "cache": {"disk": {"path": "{disk}"}}},
            "lmc-restarted": {"reuse": "cache", "restart_of": "lmc", "cache": {"disk": {"path": "{disk}"}}},
        },
        "bars": [{"a": "lmc", "b": "none", "over": "hits", "at_most": 10}],
    }
    return document | changes


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    rows = [
        {"group": f"g{index % 2}", "policy": f"policy {index % 2} " + "x" * 600, "turns": [f"question {index}"]}
        for index in range(8)
    ]
    import json

    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return tmp_path


WriteWorkload = Callable[..., Path]


@pytest.fixture
def write_workload(data_folder: Path) -> WriteWorkload:
    def write(**changes: Any) -> Path:
        path = data_folder / "workload.yaml"
        path.write_text(yaml.safe_dump(small_workload(**changes), sort_keys=False))
        return path

    return write


RunSmall = Callable[..., tuple[Results, list[RequestRecord]]]


@pytest.fixture
def run_small(write_workload: WriteWorkload, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunSmall:
    """Run the small workload on mock servers; keyword arguments replace keys of the workload.

    The client may lag as it likes, unless `lag_ms` is given: how much it lags depends on the machine.
    """

    def run(
        only: list[str] | None = None, repeat: int = 1, lag_ms: float = math.inf, **changes: Any
    ) -> tuple[Results, list[RequestRecord]]:
        monkeypatch.setattr("lmc.bench.selfcheck.LAG_MS", lag_ms)
        path = write_workload(**changes)
        workload: Workload = load_workload(path)
        options = RunOptions(path.parent, "mock-model", model_folder, only or [], repeat, serve=MOCK)
        return run_workload(workload, options)

    return run
