"""Names of chunks under vLLM's own requests: two share one exactly if the model gets the same input up to the chunk's end."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import PoolingParams, SamplingParams
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.request import Request

from lmc.cache.connectors.vllm.identity import request_identity
from lmc.cache.keys import KeyChain, Namespace, root

CHUNK, WIDTH, PLACEHOLDER = 4, 3, 7
NAMESPACE = Namespace("vllm", "model", "", "bf16", "layout", CHUNK)
IMAGES = {"cat": 3, "dog": 3, "lion": 6}  # content -> placeholders
_numbers = itertools.count()

Segment = tuple[str, Any]  # ("tokens", ids), ("embeddings", numbers), ("image", content)


@dataclass(frozen=True)
class Input:
    """What a client sends, and what of it the model gets."""

    segments: tuple[Segment, ...]
    adapter: str = ""
    tenant: str = ""
    salt: str | None = None
    audio: str | None = None  # heard by an encoder; no position of the prompt stands for it
    token_types: int | None = None
    priority: int = 0  # from here on the model gets nothing of it
    unused_row: float = 0.0  # of the embeddings, where there is a token
    unused_token: int = 0  # where there is an embedding

    def positions(self) -> list[object]:
        """What the model gets at each position."""
        got: list[object] = []
        for kind, content in self.segments:
            if kind == "image":
                got += [(content, index) for index in range(IMAGES[content])]
            else:
                got += [(kind, one) for one in content]
        return got

    def beside(self) -> tuple[object, ...]:
        return self.adapter, self.tenant, self.salt or "", self.audio, self.token_types

    def request(self) -> Request:
        ids: list[int] = []
        rows: list[list[float]] = []
        is_token: list[bool] = []
        features = []
        if self.audio is not None:
            features.append(_feature(self.audio, "audio", 0, 9))
        for kind, content in self.segments:
            if kind == "image":
                features.append(_feature(content, "image", len(ids), IMAGES[content]))
            count = IMAGES[content] if kind == "image" else len(content)
            tokens = {"tokens": content, "image": [PLACEHOLDER] * count}.get(kind, [self.unused_token] * count)
            ids += tokens
            is_token += [kind != "embeddings"] * count
            rows += [[one] * WIDTH for one in (content if kind == "embeddings" else [self.unused_row] * count)]
        embedded, mixed = not all(is_token), any(is_token) and not all(is_token)
        pooling = None
        if self.token_types is not None:
            pooling = PoolingParams(task="embed", extra_kwargs={"compressed_token_type_ids": self.token_types})
        return Request(
            f"request-{next(_numbers)}",
            ids if any(is_token) or not ids else None,
            SamplingParams(max_tokens=4) if pooling is None else None,
            pooling,
            prompt_embeds=torch.tensor(rows) if embedded else None,
            prompt_is_token_ids=is_token if mixed else None,
            mm_features=features,
            cache_salt=self.salt,
            priority=self.priority,
        )

    def names(self) -> list[bytes]:
        request = self.request()
        identity = request_identity(request, self.tenant, self.adapter)
        start = root(NAMESPACE, lora=identity.lora, tenant=identity.tenant, salt=identity.salt)
        return [bytes(key) for key in KeyChain(start, CHUNK, identity.extra).extend(request.all_token_ids)]


def _feature(content: str, modality: str, offset: int, length: int) -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec(
        data=None, modality=modality, identifier=content, mm_position=PlaceholderRange(offset=offset, length=length)
    )


SEGMENTS = st.one_of(
    st.tuples(st.just("tokens"), st.lists(st.sampled_from([0, 1, PLACEHOLDER]), min_size=1, max_size=6)),
    st.tuples(st.just("embeddings"), st.lists(st.sampled_from([0.0, 1.0, -0.5]), min_size=1, max_size=6)),
    st.tuples(st.just("image"), st.sampled_from(sorted(IMAGES))),
)
INPUTS = st.builds(
    Input,
    st.lists(SEGMENTS, min_size=1, max_size=5).map(tuple),
    adapter=st.sampled_from(["", "a", "b"]),
    tenant=st.sampled_from(["", "a", '["", "s"]', '["a"]']),
    salt=st.sampled_from([None, "s", "a"]),
    audio=st.sampled_from([None, "speech", "song"]),
    token_types=st.sampled_from([None, 1, 2]),
    priority=st.integers(0, 2),
    unused_row=st.sampled_from([0.0, 1.0]),
    unused_token=st.sampled_from([0, 1]),
)


def check(one: Input, other: Input) -> None:
    lengths = {len(one.names()), len(other.names())}
    assert len(one.names()) == len(one.positions()) // CHUNK
    for index in range(min(lengths)):
        end = (index + 1) * CHUNK
        same = one.beside() == other.beside() and one.positions()[:end] == other.positions()[:end]
        assert (one.names()[index] == other.names()[index]) == same, (index, one, other)


@settings(max_examples=300)
@given(INPUTS, INPUTS, st.data())
def test_chunks_share_a_name_exactly_if_the_model_gets_the_same(one: Input, other: Input, data: st.DataObject) -> None:
    """Any two; the same but for one thing; and the same as far as the model can see."""
    check(one, other)
    field = data.draw(st.sampled_from(["segments", "adapter", "tenant", "salt", "audio", "token_types"]))
    check(one, replace(one, **{field: getattr(other, field)}))
    unseen = replace(one, priority=other.priority, unused_row=other.unused_row, unused_token=other.unused_token)
    check(one, unseen)
    cut = data.draw(st.integers(0, len(one.segments)))
    check(one, replace(one, segments=one.segments[:cut] + other.segments))


DECIDED: dict[type, dict[str, str]] = {
    Request: {
        "prompt_token_ids prompt_embeds prompt_is_token_ids mm_features lora_request cache_salt": "in the name, see above",
        "pooling_params": "their extra_kwargs are in the name; the rest comes behind the KV",
        "request_id client_index arrival_time priority session_id trace_headers": "whose request it is, and when it runs",
        "sampling_params reasoning_ended reasoning_parser_kwargs": "sampling and output, behind the KV",
        "block_hasher kv_hints": "the engine's own caches",
        "resumable abort_immediately": "its life; a prompt that goes on gets a new name for each chunk of it",
    },
    MultiModalFeatureSpec: {
        "identifier mm_position": "in the name, see above",
        "data modality mm_hash": "what the identifier is a hash of",
    },
    PlaceholderRange: {
        "offset length": "in the name, see above",
        "is_embed": "follows from the item and from the tokens at its place",
    },
}


@pytest.mark.parametrize("kind", DECIDED, ids=lambda kind: kind.__name__)
def test_every_input_of_the_installed_version_is_decided(kind: type) -> None:
    """When this fails with a new version: look whether the model gets to see it, and write down where it belongs."""
    there = set(inspect.signature(kind.__init__).parameters) - {"self"}
    assert there - {name for names in DECIDED[kind] for name in names.split()} == set(), (
        "inputs that nobody has decided about"
    )


def test_an_embedding_beside_token_0_is_not_that_token() -> None:
    """vLLM gives both the token id 0; only its mask tells which of them the model gets."""
    first = Input((("embeddings", [1.0]), ("tokens", [0, 1, 1, 1])), unused_row=1.0)
    second = Input((("tokens", [0]), ("embeddings", [1.0]), ("tokens", [1, 1, 1])), unused_row=1.0)
    assert first.request().all_token_ids[:4] == [0, 0, 1, 1] == second.request().all_token_ids[:4]
    assert first.names()[0] != second.names()[0]


def test_a_tenant_cannot_pass_for_another_with_a_salt() -> None:
    tokens: tuple[Segment, ...] = (("tokens", [1, 2, 3, 4]),)
    assert Input(tokens, tenant='["a", "s"]').names() != Input(tokens, tenant="a", salt="s").names()
