"""Reads the Prometheus counters of engines and of lmc, subtracts readings and sums over labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

Sample = tuple[str, frozenset[tuple[str, str]]]


@dataclass(frozen=True)
class Counters:
    """One reading of every metrics page of an arm."""

    samples: dict[Sample, float]

    def total(self, name: str, **labels: str) -> float | None:
        """The sum over all samples of that name with those labels; None if there is no such sample."""
        wanted = set(labels.items())
        found = [value for (known, have), value in self.samples.items() if known == name and wanted <= have]
        return sum(found) if found else None

    def largest(self, name: str) -> float | None:
        """The largest value of a gauge that several ranks publish."""
        return max((value for (known, _), value in self.samples.items() if known == name), default=None)

    def by_label(self, name: str, label: str) -> dict[str, float]:
        sums: dict[str, float] = {}
        for (known, have), value in self.samples.items():
            if known == name and (place := dict(have).get(label)) is not None:
                sums[place] = sums.get(place, 0.0) + value
        return sums

    def label(self, name: str, label: str) -> str | None:
        """The value of a label; info metrics publish settings in labels."""
        return next((dict(have)[label] for known, have in self.samples if known == name and label in dict(have)), None)


def parse(pages: Sequence[str]) -> Counters:
    """If several pages have a name, the last one counts, because an engine may publish lmc's own metrics again."""
    samples: dict[Sample, float] = {}
    for page in pages:
        found: dict[Sample, float] = {}
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                key = (sample.name, frozenset(sample.labels.items()))
                found[key] = found.get(key, 0.0) + float(sample.value)
        names = {name for name, _ in found}
        samples = {key: value for key, value in samples.items() if key[0] not in names} | found
    return Counters(samples)


async def read_counters(http: aiohttp.ClientSession, urls: Sequence[str]) -> Counters:
    """Read the pages at these URLs. Raises aiohttp.ClientError when one does not answer."""
    pages = []
    for url in urls:
        async with http.get(url) as response:
            response.raise_for_status()
            pages.append(await response.text())
    return parse(pages)


def add_up(readings: Sequence[Counters]) -> Counters:
    """The sums over the readings of several instances."""
    samples: dict[Sample, float] = {}
    for reading in readings:
        for key, value in reading.samples.items():
            samples[key] = samples.get(key, 0.0) + value
    return Counters(samples)


def difference(after: Counters, before: Counters, name: str, **labels: str) -> float | None:
    """How much a counter grew; a counter that appears later began at 0."""
    end = after.total(name, **labels)
    return None if end is None else end - (before.total(name, **labels) or 0.0)
