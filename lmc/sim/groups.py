"""Hits by tenant: of each in a shared cache, and of each alone with the best split of the capacity into quotas."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lmc.sim.projections import group_curves
from lmc.sim.stack import HitCurve, hit_curve, profile
from lmc.sim.trace import Trace, Window, select_requests


@dataclass(frozen=True)
class GroupHits:
    group: str
    requests: int
    total_tokens: int
    shared_hit_tokens: int  # in one cache that all tenants share
    quota_blocks: int  # trace blocks that the best split gives to the tenant
    quota_hit_tokens: int  # in a cache of its own of that size


def group_hits(trace: Trace, capacity: float, window: Window = "all") -> list[GroupHits]:
    """One row per tenant at a capacity in trace blocks, in the order in which tenants appear."""
    total = int(min(capacity, trace.num_unique))
    shared = group_curves(profile(trace), window)
    alone: list[HitCurve] = []
    first = trace.first_request(window)
    requests = []
    for code in range(len(trace.tenant_names)):
        mine = trace.tenants == code
        part = select_requests(trace, mine)
        warm = int(mine[:first].sum())
        curve = profile(part)
        measured = curve.request >= warm
        whole = hit_curve(curve, "all", measured)
        alone.append(HitCurve(whole.hit_blocks, whole.hit_tokens, 0, int(part.input_tokens[warm:].sum())))
        requests.append(part.num_requests - warm)
    quotas = split(alone, total)
    return [
        GroupHits(name, count, own.total_tokens, shared[name].at(total)[1], quota, own.at(quota)[1])
        for name, count, own, quota in zip(trace.tenant_names, requests, alone, quotas, strict=True)
    ]


def split(curves: list[HitCurve], capacity: int) -> list[int]:
    """Quotas in trace blocks with the most hit tokens, chosen by the gain per trace block along the concave hull of each curve.

    The split is optimal for concave curves. Of other curves the last edge of the hull may be cut, which costs at most its gain.
    """
    edges: list[tuple[float, int, int, int]] = []  # gain per trace block (negative, for sorting), curve, from, to
    for index, curve in enumerate(curves):
        corners = _hull(curve.hit_tokens.astype(np.float64))
        for low, high in pairwise(corners):
            gain = float(curve.hit_tokens[high] - curve.hit_tokens[low]) / (high - low)
            if gain > 0:
                edges.append((-gain, index, low, high))
    quotas = [0] * len(curves)
    left = capacity
    for _, index, low, high in sorted(edges):
        taken = min(high - low, left)
        quotas[index] += taken
        left -= taken
    return quotas


def _hull(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> list[int]:
    """Indices of the corners of the upper concave hull."""
    # Only points where the curve rises can be corners.
    candidates = [0, *(np.flatnonzero(np.diff(values) > 0) + 1).tolist()]
    corners: list[int] = []
    for point in candidates:
        while len(corners) >= 2:
            a, b = corners[-2], corners[-1]
            if (values[b] - values[a]) * (point - b) > (values[point] - values[b]) * (b - a):
                break
            corners.pop()
        corners.append(point)
    return corners
