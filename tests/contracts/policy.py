"""Random requests for the contract of eviction policies. The host that checks it is lmc.sim.policy_host, which users run too."""

from __future__ import annotations

from hypothesis import strategies as st

from lmc.sim.policy_host import Host, IsBlocked, Key, NodePolicy, Policy, Request, run_policy, run_spec

__all__ = [
    "Host",
    "IsBlocked",
    "Key",
    "NodePolicy",
    "Policy",
    "Request",
    "flat_workloads",
    "run_policy",
    "run_spec",
    "workloads",
]


@st.composite
def workloads(draw: st.DrawFn, max_requests: int = 40, max_length: int = 6) -> list[list[int]]:
    """Chains that start anew, repeat, extend or fork an earlier one."""
    chains: list[list[int]] = []
    for _ in range(draw(st.integers(1, max_requests))):
        kept: list[int] = []
        if chains and draw(st.integers(0, 4)):
            source = chains[draw(st.integers(0, len(chains) - 1))]
            kept = source[: draw(st.integers(0, len(source)))]
        room = max_length - len(kept)
        new = draw(st.lists(st.integers(0, 2), min_size=0 if kept else 1, max_size=max(room, 1)))
        chains.append(kept + new)
    return chains


flat_workloads = st.lists(st.integers(0, 11), min_size=1, max_size=120).map(
    lambda labels: [[label] for label in labels]
)
