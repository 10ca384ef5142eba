"""Measures the lossless codec on KV of a model that reads a text, or on chunks that lmc has stored: how short, how fast, where it pays."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmc.cache.keys import Element
from lmc.cache.sections import Compress
from lmc.cache.tiers.codec import ELEMENTS, codes_for, decode, encode, prepare
from lmc.cache.tiers.format import FOOTER_BYTES
from lmc.errors import ConfigError, RunError
from lmc.probe.inspect import inspect_file
from lmc.report import Cell, Column, Table

if TYPE_CHECKING:
    import torch

CHUNK_TOKENS = 128
DTYPES: dict[Element, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "float8_e4m3fn"}


@dataclass(frozen=True)
class CodecRow:
    """Of all chunks together; GB are 1e9 raw bytes a second of CPU time, so that other work on the machine counts little; medians."""

    compress: Compress
    ratio: float  # stored bytes / raw bytes
    encode_gb_per_s: float
    decode_gb_per_s: float
    pays_below_gb_per_s: float = field(init=False)  # a tier that reads slower loads such a chunk sooner than a raw one

    def __post_init__(self) -> None:  # a property would be missing from the JSON
        object.__setattr__(self, "pays_below_gb_per_s", self.decode_gb_per_s * (1 - self.ratio))


@dataclass(frozen=True)
class CodecProbe:
    source: str
    element: Element
    chunks: int
    chunk_bytes: int
    rows: list[CodecRow]


def probe_codec(source: str, element: Element, chunks: Sequence[bytes], repetitions: int = 3) -> CodecProbe:
    """Raises ConfigError without a chunk or a code, and RunError when a chunk does not come back as it was."""
    if not chunks:
        raise ConfigError(f"{source}: there is no whole chunk to measure; give a longer text or more files")
    codes = codes_for(element)
    if not codes:
        raise ConfigError(f"{source}: there is no code for numbers of an unknown kind; say which with --element")
    rows = [_measure(compress, element, chunks, repetitions) for compress in codes]
    return CodecProbe(source, element, len(chunks), len(chunks[0]), rows)


def _measure(compress: Compress, element: Element, chunks: Sequence[bytes], repetitions: int) -> CodecRow:
    prepare(compress, element)
    encoding, decoding = [], []
    stored = raw = 0
    for chunk in [chunks[0], *(chunk for chunk in chunks for _ in range(repetitions))]:  # the first one warms up
        out = memoryview(bytearray(len(chunk)))
        started = time.thread_time()
        encoded = encode(compress, element, memoryview(chunk))
        between = time.thread_time()
        if encoded is not None:
            decode(compress, element, encoded, out)
        ended = time.thread_time()
        if encoded is not None and out != chunk:
            raise RunError(f"{compress} has changed a chunk of {element}; report this, and set compress to none")
        encoding.append(len(chunk) / (between - started) / 1e9)
        decoding.append(len(chunk) / max(ended - between, 1e-9) / 1e9)
        stored += len(chunk if encoded is None else encoded)
        raw += len(chunk)
    return CodecRow(compress, stored / raw, statistics.median(encoding[1:]), statistics.median(decoding[1:]))


def read_element(given: str | None, otherwise: Element) -> Element:
    """Raises ConfigError for one that is not known."""
    for element in ELEMENTS:
        if given == element:
            return element
    if given is not None:
        raise ConfigError(f"element {given!r} is not known; choose one of {', '.join(DTYPES)}")
    return otherwise


def read_text(path: Path | None) -> str:
    """The text of a file, or prose that every Python has. Raises ConfigError."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n".join(topics.values())
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}; give a text file") from None


def model_chunks(folder: Path, text: str, element: Element, tokens: int) -> list[bytes]:
    """The KV of the first so many tokens of a text, in chunks as lmc lays them out: by layer, keys before values.

    Raises ConfigError where Transformers is missing or the text is too short.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"running a model needs the package {error.name}; install lmc-kv[model], or give chunk files"
        ) from error
    if element not in DTYPES:
        raise ConfigError(f"a model's KV cannot be of {element}; choose one of {', '.join(DTYPES)}")
    ids = AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:tokens]
    if len(ids) < CHUNK_TOKENS:
        raise ConfigError(f"the text has {len(ids)} tokens, less than a chunk of {CHUNK_TOKENS}; give a longer one")
    kept = getattr(torch, DTYPES[element])
    computed = torch.bfloat16 if element == "fp8" else kept
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=computed)
    with torch.no_grad():
        layers = model(torch.tensor([ids]), use_cache=True).past_key_values.layers
    return list(_cut(layers, kept, len(ids)))


def _cut(
    layers: Sequence[Any], kept: torch.dtype, tokens: int
) -> Iterator[bytes]:  # Any: Transformers' layers of a cache
    import torch

    whole = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers]).to(kept)
    for start in range(0, tokens - CHUNK_TOKENS + 1, CHUNK_TOKENS):
        part = whole[..., start : start + CHUNK_TOKENS, :].contiguous()
        yield part.view(torch.uint8).numpy().tobytes()


def stored_chunks(paths: Sequence[Path]) -> tuple[Element, list[bytes]]:
    """The raw chunks in files of a disk tier, and what they consist of as far as their footers say. Raises ConfigError for damaged ones."""
    chunks, elements = [], set[Element]()
    for path in paths:
        found = inspect_file(path)
        if found.footer is None or found.problem is not None:
            raise ConfigError(f"{path}: {found.problem}; give sound chunk files")
        payload = memoryview(path.read_bytes())[:-FOOTER_BYTES]
        coding = found.footer.coding
        if coding is not None:
            raw = bytearray(coding.raw_bytes)
            decode(coding.compress, coding.element, payload, memoryview(raw))
            elements.add(coding.element)
        chunks.append(bytes(payload if coding is None else raw))
    return elements.pop() if len(elements) == 1 else "opaque", chunks


def codec_table(probe: CodecProbe) -> Table:
    columns = [
        Column("compress"),
        Column("ratio", "", 3),
        Column("encode", "GB/s", 2),
        Column("decode", "GB/s", 2),
        Column("loads sooner below", "GB/s", 2),
    ]
    rows: list[list[Cell]] = [
        [row.compress, row.ratio, row.encode_gb_per_s, row.decode_gb_per_s, row.pays_below_gb_per_s]
        for row in probe.rows
    ]
    size = f"{probe.chunks} chunks of {probe.chunk_bytes:,} bytes"
    note = f"{size}. Rates are raw bytes per second of CPU time; every chunk came back bit for bit."
    return Table(f"Lossless compression of {probe.element} KV: {probe.source}", columns, rows, note)
