"""The weights that an engine holds: their names, what hides them, and whether they have changed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lmc.cache.connectors import weights
from lmc.cache.connectors.weights import HeldWeights, condense, find_models, name_weights


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.dense = nn.Linear(64, 64)
        self.register_buffer("scale", torch.ones(()), persistent=False)


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(Layer(), Layer())


def pack(layer: nn.Module) -> None:
    """As vLLM does on CPUs: the kernel has a copy that only a function reaches, and the parameter is empty."""
    held = layer.weight.detach().clone()
    layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    layer.cpu_linear = lambda x: x @ held.t()  # type: ignore[assignment]


def test_models_are_equal_by_their_weights_and_by_nothing_else() -> None:
    digest = HeldWeights([model()]).read().digest
    assert HeldWeights([model()]).read().digest == digest
    assert HeldWeights([model(1)]).read().digest != digest


@pytest.mark.parametrize("name", [name for name, _ in (*model().named_parameters(), *model().named_buffers())])
def test_any_one_weight_changes_the_name_and_is_noticed(name: str) -> None:
    """A norm, a bias and a scale as much as a matrix."""
    one = model()
    held = HeldWeights([one])
    before = held.read()
    assert not held.read().changed
    tensor = dict((*one.named_parameters(), *one.named_buffers()))[name]
    tensor.data.view(-1)[-1] += 1e-3
    after = held.read()
    assert after.changed and after.digest != before.digest
    assert after.is_complete
    assert not held.read().changed


def test_adapters_do_not_rename_the_weights_below_them() -> None:
    plain = nn.ModuleDict({"a": nn.ModuleDict({"base_layer": nn.Linear(4, 4)})})
    bare = nn.ModuleDict({"a": plain["a"]["base_layer"]})  # type: ignore[index]
    assert HeldWeights([plain]).read().digest == HeldWeights([bare]).read().digest


def test_hidden_weights_are_named_by_the_files_if_these_are_what_was_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LMC_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model.safetensors").write_bytes(b"one")

    def name(source: Path | None = tmp_path) -> str:
        one = model()
        pack(one[0].dense)  # type: ignore[index,arg-type]
        reading = HeldWeights([one]).read(source)
        assert not reading.is_complete
        return name_weights([reading])

    monkeypatch.setattr(weights, "unchanged_since_start", lambda _: True)
    first = name()
    assert name() == first
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert name() != first
    assert not caplog.records
    assert name(None) != name(None)  # made up by the engine, or from elsewhere
    assert "not loaded from a folder" in caplog.text
    (tmp_path / "model.safetensors").unlink()
    assert name() != name()
    assert "holds no weights" in caplog.text
    monkeypatch.setattr(weights, "unchanged_since_start", lambda _: False)
    (tmp_path / "model.safetensors").write_bytes(b"one")
    assert name() != name() != first
    assert "newer than this process" in caplog.text


def test_hidden_weights_have_changed_when_they_were_packed_anew() -> None:
    one = model()
    dense = one[0].dense  # type: ignore[index]
    pack(dense)
    held = HeldWeights([one])
    held.read()
    assert not held.read().changed
    dense.weight = nn.Parameter(torch.ones(64, 64))
    pack(dense)
    assert held.read().changed
    assert not held.read().changed
    del dense.cpu_linear  # now nobody can tell
    held.read()
    assert held.read().changed


def test_what_a_quantisation_lacks_hides_nothing() -> None:
    one = model()
    one[0].dense.g_idx = nn.Parameter(torch.empty(0, dtype=torch.int32), requires_grad=False)  # type: ignore[index]
    assert HeldWeights([one]).read().is_complete


def test_weights_that_lie_elsewhere_or_cannot_be_found_are_never_complete() -> None:
    assert not HeldWeights([]).read().is_complete
    elsewhere = HeldWeights([model()], is_all=False)
    elsewhere.read()
    again = elsewhere.read()
    assert again.changed and not again.is_complete


def test_weights_that_cannot_be_read_get_a_name_of_their_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("no room for 32 MiB")

    monkeypatch.setattr(weights, "add_tensor", no_room)
    held = HeldWeights([model()])
    names = [name_weights([held.read()]) for _ in range(2)]
    assert names[0] != names[1]
    assert "no room" in caplog.text


def test_all_ranks_agree_on_one_name_and_each_counts() -> None:
    ranks = [HeldWeights([model(seed)]).read() for seed in range(3)]
    names = {name_weights(order) for order in ([ranks[0]], ranks, ranks[:2], [ranks[0], ranks[2]], ranks[1::-1])}
    assert len(names) == 5
    unsure = HeldWeights([]).read()
    assert name_weights([ranks[0], unsure]) == name_weights([ranks[0], unsure])  # by whichever rank it is asked
    assert name_weights([ranks[0], unsure]) != name_weights([ranks[0], HeldWeights([]).read()])


def test_a_model_is_found_by_one_of_its_layers() -> None:
    one, other = model(), model()
    assert find_models([one[1]]) == [one]  # type: ignore[index]
    assert find_models([other[0], one[1]]) == [other, one]  # type: ignore[index]
    assert find_models([]) == []


@given(st.integers(0, 40_000), st.data())
def test_what_a_device_condenses_tells_any_two_tensors_apart(size: int, data: st.DataObject) -> None:
    """On a device only this much comes to the CPU. Words trade places, and bits flip in pairs, sign bits too."""
    raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    before = condense(raw)
    assert len(before) <= size // 1024 + 8192
    assert torch.equal(before, condense(raw.clone()))
    if size == 0:
        return
    changed = raw.clone()
    for place in data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4, unique=True)):
        changed[place] ^= data.draw(st.sampled_from([1, 0x40, 0x80, 0xFF]))
    assert not torch.equal(before, condense(changed))
    if size >= 16 and not torch.equal(raw[:8], raw[8:16]):
        assert not torch.equal(before, condense(torch.cat([raw[8:16], raw[:8], raw[16:]])))


def test_condensing_does_not_depend_on_where_the_bytes_lie() -> None:
    raw = torch.arange(3 * 8192 + 5, dtype=torch.int64).to(torch.uint8)
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), raw])[3:]
    assert shifted.data_ptr() % 8
    assert torch.equal(condense(raw), condense(shifted))
    pieces = weights._PIECE_BLOCKS
    try:
        weights._PIECE_BLOCKS = 1
        assert torch.equal(condense(raw), condense(shifted))
    finally:
        weights._PIECE_BLOCKS = pieces


def test_vllm_reads_files_only_where_it_loads_them_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from lmc.cache.connectors.vllm.identity import weights_source

    def source(name: str, load_format: str) -> Any:
        load = SimpleNamespace(load_format=load_format, download_dir=str(tmp_path / "hub"))
        return weights_source(
            SimpleNamespace(model_config=SimpleNamespace(model=name, revision=None), load_config=load)
        )  # type: ignore[arg-type]

    assert source(str(tmp_path), "auto") == tmp_path
    for other in ("dummy", "runai_streamer", "tensorizer", "sharded_state", "somebody's own"):
        assert source(str(tmp_path), other) is None
    assert source("nobody/nothing", "auto") is None
    assert source("s3://bucket/model", "auto") is None
