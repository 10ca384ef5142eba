"""Who gets the memory of a node: whoever wants it, as long as there is some; then each namespace with engines has a right to an equal part.

What a namespace has beyond its part is lent. It is taken back, run by run, when one that has less wants it, because its chunks had to make
room or found none. A namespace without engines has a right to nothing, but keeps what nobody wants.
"""

from __future__ import annotations

from collections.abc import Iterable

from lmc.cache.node.domain import Domain
from lmc.cache.node.memory import Extents


def share_out(extents: Extents, domains: Iterable[Domain], now: float) -> None:
    """Call it now and then; each call moves at most one run."""
    domains = list(domains)
    for domain in domains:
        if domain.giving_back:
            domain.give_back(now)
    part = extents.count // max(1, sum(domain.num_engines > 0 for domain in domains))
    hungry = [
        domain for domain in domains if domain.wants and domain.num_engines and _extents_with_one_more(domain) <= part
    ]
    for domain in domains:
        domain.wants = 0
        domain.may_grow = not hungry or _surplus(domain, part) < 0 or domain in hungry
    if not hungry:
        return
    neediest = min(hungry, key=lambda domain: domain.places.num_extents)
    if neediest.grow():
        return
    donors = [domain for domain in domains if _surplus(domain, part) > 0 and domain.places.num_extents]
    if donors and not any(domain.giving_back for domain in domains):
        donor = max(donors, key=lambda domain: _surplus(domain, part))
        donor.give_back(now)
        neediest.grow()


def _extents_with_one_more(domain: Domain) -> int:
    return domain.places.num_extents + domain.places.run


def _surplus(domain: Domain, part: int) -> int:
    """Extents beyond what it has a right to."""
    return domain.places.num_extents - (part if domain.num_engines else 0)
