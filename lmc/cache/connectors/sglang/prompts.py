"""Two names of each page: SGLang's hash, by which the linker interface asks, and lmc's key, by which the cache answers."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str

from lmc.cache.connectors.edge import Wishes
from lmc.cache.keys import ChunkKey, KeyChain, Namespace, hashed_name, root
from lmc.cache.scheduler.cache import Identity


class Prompt:
    """A request's tokens with both names of their full pages."""

    def __init__(self, request: Any, wishes: Wishes, namespace: Namespace, tenant: str) -> None:  # sglang's Req
        size = namespace.chunk_tokens
        self._request = request
        self.wishes = wishes
        self.tokens: Sequence[int] = request.origin_input_ids + request.output_ids
        self.identity = Identity(
            lora=hashed_name(
                request.extra_key or ""
            ),  # with the adapter's id, which SGLang draws anew in every process
            tenant=tenant,
            salt=hashed_name(request.cache_salt or ""),
            request_class=wishes.request_class,
            session=wishes.session,
        )
        start = root(namespace, lora=self.identity.lora, tenant=tenant, salt=self.identity.salt)
        self.keys: list[ChunkKey] = KeyChain(start, size).extend(self.tokens)
        whole = RadixKey(array("q", self.tokens), request.extra_key, cache_salt=request.cache_salt)
        full = whole[: len(self.keys) * size]
        self.hashes: list[str] = list(get_storage_hash_str(full, None, page_size=size)) if self.keys else []
        self._position = {name: index for index, name in enumerate(self.hashes)}
        self.computed = 0  # tokens that SGLang held at the last lookup
        self.looked_up = False
        self.waiting = False  # the last lookup's answer was "ask again"
        self.loading = False

    def position(self, hashes: Sequence[str]) -> int | None:
        """The index of the first of consecutive pages of this prompt; None if they are not that."""
        start = self._position.get(hashes[0]) if hashes else None
        if start is None or self.hashes[start : start + len(hashes)] != list(hashes):
            return None
        return start

    def explain(self, explanation: Mapping[str, object]) -> None:
        """To the client, if it asked: SGLang sends this with the first token, as meta_info["lmc"]."""
        if self.wishes.explain and explanation:
            self._request.customized_info = {"lmc": [dict(explanation)]}


def unsupported(request: Any) -> bool:
    """True if the request's KV depends on more than its tokens and salts, or is not kept by token."""
    return (
        request.multimodal_inputs is not None
        or request.input_embeds is not None
        or request.positional_embed_overrides is not None
    )


@dataclass(frozen=True, slots=True)
class _Page:
    key: ChunkKey
    before: str  # hash of the page before it; empty for the first
    tenant: str


class PageKeys:
    """lmc's key for pages that prompts have shown. Bounded: pages not seen for the longest time are forgotten."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._pages: OrderedDict[str, _Page] = OrderedDict()

    def learn(self, prompt: Prompt) -> None:
        """A child is forgotten before its parent."""
        parents = ["", *prompt.hashes]
        for index in reversed(range(len(prompt.hashes))):
            name = prompt.hashes[index]
            self._pages[name] = _Page(prompt.keys[index], parents[index], prompt.identity.tenant)
            self._pages.move_to_end(name)
        while len(self._pages) > self._capacity:
            self._pages.popitem(last=False)

    def leading(self, hashes: Sequence[str]) -> list[ChunkKey]:
        """Keys of the hashes up to the first unknown one."""
        keys = []
        for name in hashes:
            page = self._pages.get(name)
            if page is None:
                break
            keys.append(page.key)
        return keys

    def tenant(self, name: str) -> str:
        """Whose a known page is."""
        return self._pages[name].tenant

    def before(self, name: str) -> list[ChunkKey]:
        """Keys of all pages before this one, from the start of the prompt; empty if one of them is unknown."""
        keys: list[ChunkKey] = []
        page = self._pages.get(name)
        while page is not None and page.before:
            page = self._pages.get(page.before)
            if page is None:
                return []
            keys.append(page.key)
        return keys[::-1]
