"""Checks that all arms give the same output: greedy tokens must be equal, except where the reference's two best were nearly tied."""

from __future__ import annotations

from collections.abc import Sequence

from lmc.bench.records import OutputCheck, RequestRecord

TIE_LOGPROB = 1e-3  # a different batch shape rounds differently; a wrong KV byte moves log-probabilities far more
MAX_SHOWN = 20


def compare_outputs(
    arm: str, records: Sequence[RequestRecord], reference_arm: str, reference: Sequence[RequestRecord]
) -> OutputCheck:
    """Compare token by token. After a tie that the arm decided differently, the rest of that request is not compared."""
    expected = {(record.repeat, record.request_id): record for record in reference if record.ok and record.tokens}
    differences: list[str] = []
    requests = tokens = ties = 0
    for record in records:
        other = expected.get((record.repeat, record.request_id))
        if other is None or not record.ok or not record.tokens:
            continue
        requests += 1
        for position, (got, wanted) in enumerate(zip(record.tokens, other.tokens, strict=False)):
            tokens += 1
            if got == wanted:
                continue
            if other.gaps[position] < TIE_LOGPROB:
                ties += 1
            else:
                differences.append(
                    f"{record.request_id}: token {position} is {got}, {reference_arm} has {wanted} "
                    f"(its two best lie {other.gaps[position]:.4f} apart)"
                )
            break
        else:
            if len(record.tokens) != len(other.tokens):
                differences.append(
                    f"{record.request_id}: {len(record.tokens)} tokens, {reference_arm} has {len(other.tokens)}"
                )
    return OutputCheck(arm, reference_arm, requests, tokens, ties, differences[:MAX_SHOWN])
