from __future__ import annotations

import orjson
import pytest

from lmc.cache.keys import KeyChain, root
from lmc.errors import ConfigError
from tests.cache.instance import CHUNK_TOKENS, Instance, prompt, settings


def test_the_record_says_what_was_asked_and_what_was_found(tmp_path):
    trace = tmp_path / "trace.jsonl"
    instance = Instance(settings(record=trace))
    tokens = prompt(1, 50)
    instance.serve(tokens)
    instance.serve(tokens)
    instance.close()
    header, *lines = [orjson.loads(line) for line in trace.read_bytes().splitlines()]
    assert (header["format"], header["version"], header["chunk_tokens"]) == ("lmc-trace", 1, CHUNK_TOKENS)
    keys = KeyChain(root(instance.scheduler.namespace), CHUNK_TOKENS).extend(tokens)
    assert [line["chunks"] for line in lines] == [[key.hex()[:16] for key in keys]] * 2
    assert [line["tokens"] for line in lines] == [50, 50]
    assert lines[0]["hit_tokens"] == {"device": 0}
    assert lines[1]["hit_tokens"] == {"device": 0, "host": 48}
    assert 0 <= lines[0]["t"] <= lines[1]["t"]
    assert str(tokens[0]) not in [str(value) for value in lines[0].values()], "no token ids are written"


def test_a_record_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot write the trace"):
        Instance(settings(record=tmp_path / "absent" / "trace.jsonl"))
