"""Models and tokenizers by name: what is said when there is none."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from lmc import model
from lmc.errors import ModelError


@pytest.mark.parametrize("find", [model.resolve_model, model.resolve_tokenizer, model.resolve_tokenizer_folder])
def test_a_network_that_hangs_is_not_waited_for(find: object, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def hang(*_: object) -> None:
        over.wait()
        raise OSError

    monkeypatch.setattr(socket, "create_connection", hang)
    monkeypatch.setattr(model, "_CONNECT_S", 0.1)
    monkeypatch.setattr(model, "getproxies", dict)
    try:
        with pytest.raises(
            ModelError, match="cannot be reached, and there is no copy in the local cache; give a local"
        ) as told:
            find("nobody/nothing-here")  # type: ignore[operator]
    finally:
        over.set()
    assert "\n" not in str(told.value)


def test_a_tokenizer_is_found_by_its_file_or_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    assert model.resolve_tokenizer_folder(str(tmp_path)) == tmp_path
    assert model.resolve_tokenizer_folder(str(tmp_path / "tokenizer.json")) == tmp_path
    with pytest.raises(ModelError, match="there is no tokenizer 'nowhere'"):
        model.resolve_tokenizer_folder("nowhere")
