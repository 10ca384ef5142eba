"""lmc probe model: the KV groups of a checkpoint, from its configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lmc.cache.parts import Group
from lmc.cache.shape import ModelShape, read_shape
from lmc.cli.probe import app
from lmc.errors import ConfigError
from lmc.probe.model_shape import probe_shape

BLOCK = 16


def checkpoint(folder: Path, kind: str, **values: Any) -> Path:
    common = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128, "head_dim": 32}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "dtype": "bfloat16", **common, **values}))
    return folder


def layer_bytes(element: int) -> int:
    return 2 * 2 * 32 * element * BLOCK


def test_a_gemma_has_one_full_group_and_five_of_windows(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, "gemma3_text", num_hidden_layers=12, sliding_window=512)
    shape = probe_shape(model, BLOCK)
    assert shape.groups == (Group("full", BLOCK), *[Group("window", BLOCK, 512)] * 5)
    assert shape.block_bytes == (2 * layer_bytes(2),) * 6


def test_a_group_may_have_a_layer_less_than_the_others(tmp_path: Path) -> None:
    kinds = ["full_attention"] * 4 + ["sliding_attention"] * 5
    model = checkpoint(tmp_path, "gemma3_text", num_hidden_layers=9, sliding_window=64, layer_types=kinds)
    shape = probe_shape(model, BLOCK, "float32")
    assert shape == ModelShape(
        (Group("full", BLOCK), Group("window", BLOCK, 64)), (4 * layer_bytes(4), 5 * layer_bytes(4))
    )


def test_a_plain_model_has_one_group(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, "llama", num_hidden_layers=3)
    assert probe_shape(model, BLOCK) == ModelShape((Group("full", BLOCK),), (3 * layer_bytes(2),))


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("mistral", {"sliding_window": 64}, "every layer has a window"),
        ("llama4_text", {"layer_types": ["chunked_attention", "full_attention"]}, "of the kind chunked_attention yet"),
        (
            "gemma3_text",
            {"layer_types": ["full_attention"] * 8 + ["sliding_attention"] * 2, "num_hidden_layers": 10},
            "several groups of layers keep all tokens",
        ),
        ("llama", {"dtype": "int8"}, "give --dtype float32 or bfloat16"),
    ],
)
def test_what_is_not_described(tmp_path: Path, kind: str, values: dict[str, Any], said: str) -> None:
    model = checkpoint(tmp_path, kind, **{"num_hidden_layers": 2, **values})
    with pytest.raises(ConfigError, match=said):
        probe_shape(model, BLOCK)


def test_the_command_writes_a_file_that_the_simulator_reads(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", "gemma3_text", num_hidden_layers=6, sliding_window=512)
    out = tmp_path / "shape.json"
    result = CliRunner().invoke(app, ["model", str(model), "--output", str(out), "--json"])
    assert result.exit_code == 0
    written = json.loads(out.read_text())
    assert json.loads(result.stdout) == written
    assert read_shape(written, "it") == probe_shape(model, BLOCK)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other"}, "it: this is not a model's shape"),
        ({"version": 9}, "version 9"),
        ({"groups": []}, "has no groups"),
        ({"groups": [{"kind": "full"}]}, "group 0 must have block_bytes, block_tokens, kind, span"),
        ({"groups": [{"kind": "window", "block_tokens": 16, "span": 8, "block_bytes": 1}] * 2}, "must keep all tokens"),
        ({"groups": [{"kind": "full", "block_tokens": 0, "span": 0, "block_bytes": 1}]}, "must be positive"),
        ({"groups": [{"kind": "half", "block_tokens": 1, "span": 0, "block_bytes": 1}]}, "kind must be one of"),
    ],
)
def test_a_file_that_is_no_shape_is_refused(change: dict[str, Any], said: str) -> None:
    shape = ModelShape((Group("full", BLOCK), Group("window", BLOCK, 64)), (1, 1)).to_json()
    assert read_shape(shape, "it").to_json() == shape
    with pytest.raises(ConfigError, match=said):
        read_shape(shape | change, "it")
