"""Model families with several kinds of KV on the real engine: python -m benchmarks.families [FAMILY...].

Of each family a tiny model with random weights is run with and without lmc: cold, from host memory, longer prompts, prompts that part, five
at once, a failed load, an abort while loading, from disk after a restart, and beside what the device holds. Log-probabilities must be the
same, and must not be where the bytes of one KV group were left out. Exit code 1 if one of that does not hold.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lmc.bench.outputs import TIE_LOGPROB
from lmc.report import Column, Table, print_table
from tests.engines import tiny_model
from tests.engines.scenario import driver, prompt
from tests.engines.vllm_driver import VllmDriver

PAST_LMC = {"kv_transfer_params": {"lmc": {"bypass": True}}}


@dataclass(frozen=True)
class Family:
    make: Callable[[Path], Path]
    options: dict[str, Any] = field(default_factory=dict)
    chunk: int | None = 64  # None: as lmc chooses it
    in_batches: bool = True  # without lmc, too, the engine computes the same in any batch
    refused: bool = False  # lmc does not cache it yet; this is what would have to hold


_MAMBA = {
    "block_size": 64,
    "max_num_batched_tokens": 64,
}  # on a CPU vLLM's Mamba 2 computes one block of a prompt at a time
_CONV = {
    "block_size": 32,
    "max_num_batched_tokens": 32,
}  # vLLM's convolutions round differently in steps of other lengths
FAMILIES = {
    "Gemma 3": Family(partial(tiny_model.make_tiny_gemma, window=64)),
    "Gemma 3, more full layers": Family(partial(tiny_model.make_tiny_gemma, window=64, pattern="wffwff")),
    "Gemma 4": Family(partial(tiny_model.make_tiny_gemma4, window=64), chunk=None, refused=True),
    "gpt-oss": Family(partial(tiny_model.make_tiny_gpt_oss, window=128)),
    "Llama 4": Family(partial(tiny_model.make_tiny_llama4, span=128)),
    "Mistral": Family(partial(tiny_model.make_tiny_mistral, window=64)),
    "Falcon-H1": Family(tiny_model.make_tiny_falcon, _MAMBA),
    "Falcon-H1, bfloat16": Family(tiny_model.make_tiny_falcon, {**_MAMBA, "dtype": "bfloat16"}),
    "Granite 4": Family(tiny_model.make_tiny_granite, _MAMBA),
    "Nemotron-H": Family(tiny_model.make_tiny_nemotron, _MAMBA),
    "Qwen 3-Next": Family(
        tiny_model.make_tiny_qwen3_next, {"block_size": None, "dtype": "bfloat16"}, None, in_batches=False
    ),
    "LFM 2": Family(tiny_model.make_tiny_lfm2, _CONV, None, in_batches=False, refused=True),
}


@dataclass
class Proof:
    family: str
    rows: list[tuple[str, str, str, bool]] = field(default_factory=list)

    def note(self, what: str, cached: list[int], error: float, *, differs: bool = False) -> None:
        """error: the largest difference of log-probabilities. differs: there must be one."""
        self.rows.append((self.family, what, f"{cached} {error:.6f}", (error >= TIE_LOGPROB) == differs))
        print(*self.rows[-1], flush=True)


def error_of(got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> float:
    """Up to a token that differs behind a tie."""
    worst = 0.0
    for one, reference in zip(got, wanted, strict=True):
        for step, (token, expected) in enumerate(zip(one["tokens"], reference["tokens"], strict=True)):
            if token != expected:
                worst = max(worst, 0.0 if reference["gaps"][step] < TIE_LOGPROB else float("inf"))
                break
            error = abs(one["logprobs"][step] - reference["logprobs"][step])
            worst = max(worst, error if error == error else float("inf"))  # not a number: wrong
    return worst


def compare(engine: VllmDriver, proof: Proof, what: str, *texts: list[int]) -> None:
    reference = engine.generate(list(texts), extra_args=PAST_LMC)
    engine.call("settle")
    engine.call("reset_device")
    got = engine.generate(list(texts))
    engine.call("settle")
    engine.call("reset_device")
    proof.note(what, [one["cached"] for one in got], error_of(got, reference))


@contextmanager
def started(family: Family, model: Path, disk: Path) -> Iterator[tuple[VllmDriver, int]]:
    settings = {"disk.path": str(disk), "disk.fsync": False, "checkpoint_tokens": 128, "chunk_tokens": family.chunk}
    settings["host.capacity"] = "512MiB"
    options = {"max_num_batched_tokens": 240, "enable_prefix_caching": True, **family.options}
    with driver(model, options=options, **settings, load_deadline=30) as engine:
        yield engine, engine.call("namespace")["chunk_tokens"]


def prove(name: str, folder: Path) -> Proof:
    family, proof = FAMILIES[name], Proof(name)
    model, disk = family.make(folder / "model"), folder / "disk"
    with started(family, model, disk) as (engine, chunk):
        text, more = prompt(1, 5 * chunk + 2), prompt(2, 2 * chunk)
        compare(engine, proof, "cold", text)
        compare(engine, proof, "host", text)
        compare(engine, proof, "longer", text + more)
        compare(engine, proof, "longer, host", text + more)
        compare(engine, proof, "second of a prefix", text[: 4 * chunk + 10] + prompt(3, chunk))
        compare(engine, proof, "parted", text[: 3 * chunk + 10] + prompt(4, chunk))
        compare(engine, proof, "parted again", text[: 3 * chunk + 10] + prompt(5, chunk))
        several = [prompt(60 + number, count * chunk + 7) for number, count in enumerate((3, 2, 2))]
        several += [text, (text + more)[: 6 * chunk + 3]]
        if family.in_batches:
            compare(engine, proof, "five at once", *several)
            compare(engine, proof, "five at once, host", *several)
        else:
            for one in several:
                compare(engine, proof, "five, one by one", one)
        reference = engine.generate([text], extra_args=PAST_LMC)
        for group, kind in enumerate(engine.call("groups")):
            engine.call("reset_device")
            engine.call("leave_out", group=group)
            got = engine.generate([text])
            proof.note(f"without group {group} {kind}", [got[0]["cached"]], error_of(got, reference), differs=True)
        engine.call("leave_out", group=None)
        engine.call("reset_device")
        engine.call("fail_loads", count=1)
        compare(engine, proof, "failed load", text)
        engine.call("abort_while_loading", prompt=text)
        compare(engine, proof, "after an abort", text)
    with started(family, model, disk) as (engine, chunk):
        compare(engine, proof, "disk", text)
        engine.generate([text[: 3 * chunk + 5]], extra_args=PAST_LMC)
        got = engine.generate([text])
        proof.note("beside the device", [got[0]["cached"]], error_of(got, reference))
        left = {what: number for what, number in engine.call("leftovers").items() if number}
        proof.rows.append((name, "left over", str(left), not left))
    return proof


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "families",
        nargs="*",
        default=[name for name, family in FAMILIES.items() if not family.refused],
        metavar="FAMILY",
        help=", ".join(FAMILIES),
    )
    chosen = parser.parse_args().families
    if unknown := set(chosen) - set(FAMILIES):
        parser.error(f"no family {unknown.pop()!r}; there are {', '.join(FAMILIES)}")
    rows = []
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            rows += prove(name, Path(folder)).rows
    columns = [Column(name) for name in ("family", "what", "cached tokens, largest difference", "holds")]
    print_table(Table("Model families", columns, rows, note=f"Equal: differences below {TIE_LOGPROB:g}."))
    return int(not all(row[3] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
