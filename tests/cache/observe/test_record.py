from __future__ import annotations

import errno
import os

import orjson
import pytest

from lmc.cache.keys import KeyChain, hashed_name, root
from lmc.cache.scheduler.cache import Identity
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


def test_a_record_holds_no_salt_and_yet_tells_tenants_apart(tmp_path):
    salts = ["my-very-secret-salt", 'a"b', "\ud800", "my-very-secret-salt", ""]
    names = []
    for file in ("one.jsonl", "other.jsonl"):
        instance = Instance(settings(record=tmp_path / file))
        for salt in salts:
            instance.serve(prompt(1, 20), Identity(tenant=hashed_name(salt)))
        instance.close()
        written = (tmp_path / file).read_bytes()
        assert not any(salt.encode(errors="ignore") in written for salt in salts if len(salt) > 3)
        names.append([orjson.loads(line)["tenant"] for line in written.splitlines()[1:]])
        assert (tmp_path / file).stat().st_mode & 0o077 == 0
    for found in names:
        assert found[0] == found[3] and found[4] == "" and len(set(found)) == 4
    assert not set(names[0]) & set(names[1]) - {""}  # a guess at a salt cannot be checked with another file


def test_a_record_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot write the trace"):
        Instance(settings(record=tmp_path / "absent" / "trace.jsonl"))


@pytest.mark.parametrize("where", ["write", "flush", "close"])
def test_a_disk_that_is_full_ends_the_record_and_not_the_cache(tmp_path, caplog, where):
    instance = Instance(settings(record=tmp_path / "trace.jsonl"))
    recorder = instance.scheduler._accounting._recorder
    file, recorder._file, recorder._flushed = recorder._file, Full(where), float("-inf")
    file.close()
    tokens = prompt(1, 50)
    instance.serve(tokens)
    assert instance.serve(tokens).loaded == 48
    instance.close()
    instance.close()
    ends = [record.getMessage() for record in caplog.records if "ends here" in record.getMessage()]
    assert ends == [f"lmc: the trace {tmp_path / 'trace.jsonl'} ends here: No space left on device"]


class Full:
    """A file whose calls of one kind, and of close(), find no room."""

    def __init__(self, where):
        self._where = where

    def write(self, data):
        self._fail("write")
        return len(data)

    def flush(self):
        self._fail("flush")

    def close(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _fail(self, where):
        if where == self._where:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
