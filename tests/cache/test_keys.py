from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.cache.keys import KEY_BYTES, KeyChain, Namespace, root
from lmc.errors import ConfigError

NAMESPACE = Namespace("vllm", "model", "main", "bf16", "layout", 4)
tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def keys(sequence, namespace=NAMESPACE, *, size=4, identity=None, **start):
    return KeyChain(root(namespace, **start), size, identity).extend(sequence)


@given(tokens, st.lists(st.integers(0, 40), max_size=4))
def test_a_chain_that_grows_has_the_keys_of_the_whole(sequence, cuts):
    chain = KeyChain(root(NAMESPACE), 4)
    for cut in sorted(cuts):
        chain.extend(sequence[:cut])
    assert chain.extend(sequence) == keys(sequence)
    assert len(chain.keys) == len(sequence) // 4
    assert all(len(key) == KEY_BYTES for key in chain.keys)


@given(tokens)
def test_any_kind_of_sequence_gives_the_same_keys(sequence):
    assert keys(tuple(sequence)) == keys(sequence)


@given(tokens, tokens)
def test_chunks_share_a_key_only_with_the_same_tokens_from_the_start(one, other):
    for index, (first, second) in enumerate(zip(keys(one), keys(other), strict=False)):
        assert (first == second) == (one[: 4 * index + 4] == other[: 4 * index + 4])


@given(st.lists(st.integers(0, 9), min_size=4, max_size=12))
def test_every_part_of_a_name_matters(sequence):
    names = {field.name for field in dataclasses.fields(Namespace)} - {"chunk_tokens"}
    changed = [
        dataclasses.replace(NAMESPACE, **{name: 2 if name in ("tp_size", "pp_size") else "other"}) for name in names
    ]
    variants = [
        keys(sequence),
        *(keys(sequence, namespace) for namespace in changed),
        keys(sequence, lora="a"),
        keys(sequence, tenant="a"),
        keys(sequence, lora="a", tenant="a"),
        keys(sequence, identity=lambda start, end: b""),
        keys(sequence, identity=lambda start, end: b"image"),
    ]
    firsts = [variant[0] for variant in variants]
    assert firsts[0] == firsts[-2], "nothing to add changes nothing"
    assert len(set(firsts)) == len(firsts) - 1


def test_identity_is_asked_for_each_chunk_of_a_growing_chain():
    asked = []

    def identity(start, end):
        asked.append((start, end))
        return b"x"

    chain = KeyChain(root(NAMESPACE), 4, identity)
    chain.extend(list(range(9)))
    chain.extend(list(range(13)))
    assert asked == [(0, 4), (4, 8), (8, 12)]


def test_names_are_the_same_in_every_process():
    """Stored chunks are found by these names; a change makes every stored chunk unreachable, so it must be wanted (KEY_VERSION)."""
    script = (
        "from lmc.cache.keys import *;"
        "n = Namespace('vllm', 'model', 'main', 'bf16', 'layout', 4);"
        "print(n.label(), KeyChain(root(n, lora='l', tenant='t'), 4).extend(list(range(8)))[1].hex())"
    )
    for seed in ("0", "1"):
        answer = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        )
        assert answer.stdout.split() == [NAMESPACE.label(), keys(list(range(8)), lora="l", tenant="t")[1].hex()]
    assert answer.stdout.split() == GOLDEN


def test_a_chunk_without_tokens_is_refused():
    with pytest.raises(ConfigError, match="positive"):
        KeyChain(root(NAMESPACE), 0)


GOLDEN = ["b450975253193b64", "5ad80558c11f5419be7c286fcf46aa28961fdee4de591858342be012f4f68cdb"]
