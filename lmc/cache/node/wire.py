"""The wire between a node and the engines that attach to it, over a Unix stream socket. docs/node.md explains it.

Each side first sends PREAMBLE. Then come frames: a length of four bytes, little-endian, and one MessagePack value. A connection is either a
worker's, which gets the memory, or a scheduler's. A scheduler sends batches of events, and each batch with a number above 0 is answered by
one Answers with the same number. Events are handled in the order in which they were sent. Nothing here depends on Python: no pickle, and
every message is an array with a number that names its kind, so that another version of lmc refuses it instead of misreading it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from lmc.cache.keys import KEY_BYTES, ChunkKey, Element, Namespace
from lmc.errors import NodeError

VERSION = 1
PREAMBLE = b"LMCNODE" + bytes([VERSION])
HEAD_BYTES = 4
MOST_FRAME_BYTES = 16 << 20  # a prompt of eight million tokens in chunks of sixteen
ASK_AGAIN = -1  # as the gain of Found
ID_BYTES = 16

Count = Annotated[int, Meta(ge=0, le=1 << 48)]
Gain = Annotated[int, Meta(ge=ASK_AGAIN, le=1 << 48)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Text = Annotated[str, Meta(max_length=4096)]
Id = Annotated[bytes, Meta(min_length=ID_BYTES, max_length=ID_BYTES)]
Ids = Annotated[list[Id], Meta(min_length=1, max_length=1024)]
Keys = Annotated[bytes, Meta(max_length=MOST_FRAME_BYTES)]  # keys of KEY_BYTES, one after the other


Kind = TypeVar("Kind")


class Message(Struct, array_like=True, forbid_unknown_fields=True):
    """A kind of message; its tag is its number on the wire."""


# The worker's connection


class TakeMemory(Message, tag=1):
    """The first message of a worker: it wants to map the memory. worker: a number of its own, for as long as it lives."""

    worker: Id
    rank: Count


class Memory(Message, tag=2):
    """The answer, with a descriptor of the memory. node: this start of the node; a slot number counts in units from the start."""

    node: Id
    size: Count
    unit: Count


class Taken(Message, tag=3):
    """The worker has mapped the memory."""


class Left(Message, tag=4):
    """No copy of the worker's touches the memory any more, and none will: it has unmapped it."""


# The scheduler's connection


class Attach(Message, tag=10):
    """The first message of a scheduler. The parts of `ranks` lie side by side in a slot; workers: who has mapped the memory for them."""

    engine: Text
    namespace: Namespace
    element: Element
    rank_bytes: Annotated[int, Meta(gt=0, le=1 << 40)]
    ranks: Annotated[list[Count], Meta(min_length=1, max_length=1024)]
    workers: Ids
    min_load_tokens: Count
    lookup_deadline: Seconds
    load_deadline: Seconds
    store_decode: bool
    announces: bool = False  # it wants to hear of changes

    @property
    def load(self) -> Literal["always"]:
        """A node does not measure the engines."""
        return "always"


class Figures(Message, tag=11):
    """The state of the namespace: (chunks, capacity) by bounded tier, chunks known to be in tiers of others, writes under way."""

    usage: dict[str, tuple[int, int]]
    known: dict[str, int]
    writing: dict[str, int]


class Attached(Message, tag=12):
    """session: of this connection, to be named by Quiet later. metrics: address of the node's metrics page, or nothing."""

    node: Id
    session: Count
    metrics: Text
    figures: Figures


class Refused(Message, tag=13):
    """Why the node does not take the peer in. The connection ends. It may ask again if that can change."""

    reason: Text


# What happens to a request; `request` is the engine's own number for it


class Begin(Message, tag=20):
    request: Count
    name: Text
    tenant: Text
    salt_differs: bool


class Lookup(Message, tag=21):
    """Answered by Found. keys: those that follow the first `known` ones, which the node has from before."""

    request: Count
    num_tokens: Count
    computed: Count
    known: Count
    keys: Keys


class Admit(Message, tag=23):
    """The engine took the request in. Answered by Loads: of the chunks from the first that the engine lacks, all or none."""

    request: Count
    num_load: Count


class Store(Message, tag=24):
    """The first num_valid tokens have valid KV. Answered by Stores: of the chunks that the engine shall copy."""

    request: Count
    known: Count
    keys: Keys
    num_valid: Count
    num_prompt: Count


class End(Message, tag=25):
    request: Count
    pin_seconds: Seconds


class Done(Message, tag=26):
    """A copy ended on every rank, or will never begin; cause: nothing if its bytes are right."""

    operation: Count
    cause: Text


class Offer(Message, tag=27):
    """Chunks that no request speaks for: those of the prefix `keys` after the first `known` ones. Answered by Stores; settled: all or 0."""

    tenant: Text
    known: Count
    keys: Keys


class Quiet(Message, tag=28):
    """No worker touches a slot of this earlier session any more."""

    session: Count


class Use(Message, tag=29):
    """A request used this prefix, wherever the engine held it. With pin_seconds it shall stay, also what is stored of it later."""

    tenant: Text
    keys: Keys
    name: Text
    pin_seconds: Seconds


class Where(Message, tag=31):
    """Answered by Places. keys: of any chunks."""

    keys: Keys


Event = Begin | Lookup | Admit | Store | End | Done | Offer | Quiet | Use | Where


class Batch(Message, tag=30):
    number: Count  # 0: no answer is wanted
    events: list[Event]


class Found(Message, tag=40):
    """gain: tokens beyond `computed` that can be loaded, or ASK_AGAIN. sources: the tiers that hold them. miss: why it ends there."""

    gain: Gain
    sources: dict[str, int]
    miss: Text


class Loads(Message, tag=41):
    """Copies to make from slot `slots[i]` to the blocks of chunk `chunks[i]` of the prompt."""

    operations: list[Count]
    chunks: list[Count]
    slots: list[Count]


class Stores(Message, tag=43):
    """Copies to make from the blocks of chunk `chunks[i]` to slot `slots[i]`. settled: leading chunks that need no store any more."""

    operations: list[Count]
    chunks: list[Count]
    slots: list[Count]
    settled: Count


class Places(Message, tag=44):
    """For each chunk the tiers that it can be read from, and whether it is on its way into host memory."""

    tiers: list[list[str]]
    arriving: list[bool]


Reply = Found | Loads | Stores | Places


class Answers(Message, tag=42):
    """Of those events that have an answer, in their order. figures: now and then.

    changes: (tier, key, whether it can be read there now), for engines that announce them. forget: there were more of them than were kept.
    A message with the number 0 has nothing else.
    """

    number: Count
    answers: list[Reply]
    figures: Figures | None = None
    changes: list[tuple[str, bytes, bool]] = []
    forget: bool = False


Greeting = TakeMemory | Attach
FromWorker = Taken | Left
FromNode = Memory | Attached | Refused

_encoder = msgspec.msgpack.Encoder()
greetings: msgspec.msgpack.Decoder[Greeting] = msgspec.msgpack.Decoder(Greeting)
worker_messages: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
welcomes: msgspec.msgpack.Decoder[FromNode] = msgspec.msgpack.Decoder(FromNode)
batches: msgspec.msgpack.Decoder[Batch] = msgspec.msgpack.Decoder(Batch)
answers: msgspec.msgpack.Decoder[Answers] = msgspec.msgpack.Decoder(Answers)


def frame(message: Message) -> bytes:
    """The message as it goes over the socket. Raises NodeError if it is too long."""
    body = _encoder.encode(message)
    if len(body) > MOST_FRAME_BYTES:
        raise NodeError(f"node: a message of {len(body)} bytes is too long; the limit is {MOST_FRAME_BYTES}")
    return len(body).to_bytes(HEAD_BYTES, "little") + body


def read(decoder: msgspec.msgpack.Decoder[Kind], body: bytes) -> Kind:
    """Raises NodeError for what is no message of these kinds."""
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise NodeError(f"node: the peer sent something else than a message of this wire: {error}") from None


def join(keys: Sequence[ChunkKey]) -> bytes:
    return b"".join(keys)


def split(keys: bytes) -> list[ChunkKey]:
    """Raises NodeError if these are no whole keys."""
    if len(keys) % KEY_BYTES:
        raise NodeError(f"node: {len(keys)} bytes are no whole number of keys")
    return [ChunkKey(keys[start : start + KEY_BYTES]) for start in range(0, len(keys), KEY_BYTES)]
