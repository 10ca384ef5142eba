"""Host slots that several processes of a node have in common: one makes their memory, and the others map it by its descriptor.

The memory is a file without a name: it is gone with the last process that maps it, however that ends. Who maps it goes by a token in
the file's name, because a number of a process may mean another one elsewhere.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from lmc.cache.transfer.pinned import slab_bytes
from lmc.errors import TierError
from lmc.units import format_size


@dataclass(frozen=True)
class SlotsOffer:
    """What another process of this node needs to map the slots. It is plain data that can be pickled."""

    process: int
    descriptor: int
    token: str
    num_slots: int
    slot_bytes: int


@dataclass(frozen=True)
class CommonSlots:
    """What one of the processes has of them."""

    part: int  # of each chunk, as names have it
    stores: bool  # this process does, for the others too
    num_slots: int
    descriptor: int  # open within `with`, or until it is closed

    def __enter__(self) -> CommonSlots:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


def offer_slots(num_slots: int, slot_bytes: int) -> SlotsOffer:
    """Memory for common slots. Its descriptor must stay open until all others have taken it. Raises TierError."""
    token = f"lmc-{secrets.token_hex(16)}"
    size = slab_bytes(num_slots, slot_bytes)
    try:
        descriptor = os.memfd_create(token)
        try:
            os.ftruncate(descriptor, size)
        except OSError:
            os.close(descriptor)
            raise
    except OSError as error:
        raise TierError(f"host tier: cannot make {format_size(size)} of common memory: {error.strerror}") from error
    return SlotsOffer(os.getpid(), descriptor, token, num_slots, slot_bytes)


def take_slots(offer: SlotsOffer, proc: Path = Path("/proc")) -> int:
    """A descriptor of the offered memory in this process. Raises TierError where it cannot be reached."""
    place = proc / str(offer.process) / "fd" / str(offer.descriptor)
    try:
        descriptor = os.open(place, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise TierError(f"host tier: cannot open the memory of process {offer.process}: {error.strerror}") from error
    name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
    if name != f"/memfd:{offer.token} (deleted)":
        os.close(descriptor)
        raise TierError(f"host tier: {place} is {name}, not the memory that was offered; is that process on this node?")
    return descriptor
