"""Builds the prompts of a workload: every token of every request is fixed before an engine starts.

So all arms get the same tokens, the simulator can predict the hits, and a second run repeats the first.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jinja2.sandbox import SandboxedEnvironment

from lmc.bench.chats import read_chats
from lmc.bench.sources import Row, find_file, read_rows, read_text
from lmc.bench.tokenizer import Message, ModelTokenizer, Tokens
from lmc.bench.traces import trace_prompts
from lmc.bench.workload import (
    ChatSource,
    FileSource,
    HubSource,
    PackageSource,
    Part,
    RandomSource,
    RepeatSource,
    Session,
    TraceSource,
    Workload,
)
from lmc.errors import WorkloadError


@dataclass(frozen=True)
class Request:
    """One turn of one session. `at_s` is a time on the data set's own clock, which has no fixed zero."""

    part: str
    session: int
    turn: int
    prompt: Tokens
    output_tokens: int
    think_s: float = 0.0
    at_s: float | None = None
    messages: tuple[Message, ...] | None = None  # of a chat
    tools: tuple[Any, ...] | None = None  # Any: JSON schemas of functions that a chat may call
    text: str | None = None  # for servers that take no tokens

    @property
    def id(self) -> str:
        return f"{self.part}/{self.session}/{self.turn}"

    @property
    def session_id(self) -> str:
        return f"{self.part}/{self.session}"


Conversation = list[Request]


@dataclass
class Prompts:
    """Sessions by part, in file order, and by part the number of requests that were left out because they exceed the context."""

    parts: dict[str, list[Conversation]] = field(default_factory=dict)
    too_long: dict[str, int] = field(default_factory=dict)

    @property
    def sessions(self) -> list[Conversation]:
        return [session for part in self.parts.values() for session in part]

    @property
    def num_requests(self) -> int:
        return sum(map(len, self.sessions))

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(request.prompt) for session in self.sessions for request in session)


def build_prompts(workload: Workload, tokenizer: ModelTokenizer, base: Path) -> Prompts:
    """Build the prompts. `base` is the folder of the workload file. Raises WorkloadError for unreadable or empty data."""
    prompts = Prompts()
    for name, part in workload.parts.items():
        sessions = _build_part(name, part, workload, tokenizer, base, prompts)
        if not sessions:
            raise WorkloadError(
                f"parts.{name}: no session is left; give a data set that is not empty, or relax `where` and `pick`"
            )
        prompts.parts[name], prompts.too_long[name] = _fit(sessions, workload.engine.context)
        if not prompts.parts[name]:
            raise WorkloadError(
                f"parts.{name}: every prompt is longer than engine.context ({workload.engine.context}); raise it"
            )
    return prompts


def random_tokens(tokenizer: ModelTokenizer, count: int, *seed: int | str) -> Tokens:
    """`count` ordinary tokens, which depend on nothing but the words of the seed."""
    words = [word if isinstance(word, int) else zlib.crc32(word.encode()) for word in seed]
    picks = np.random.default_rng(words).integers(0, len(tokenizer.ordinary), size=count)
    return tokenizer.ordinary[picks]


def in_words(request: Request, tokenizer: ModelTokenizer) -> Request:
    """The request with its text and messages, for servers that take no tokens."""
    text = tokenizer.decode(request.prompt) if request.text is None else request.text
    return replace(request, text=text, messages=request.messages or ({"role": "user", "content": text},))


def _build_part(
    name: str, part: Part, workload: Workload, tokenizer: ModelTokenizer, base: Path, earlier: Prompts
) -> list[Conversation]:
    source = part.source
    if isinstance(source, RandomSource):
        return [
            [
                Request(
                    name,
                    index,
                    0,
                    random_tokens(tokenizer, source.tokens, workload.seed, name, index),
                    part.output_tokens,
                )
            ]
            for index in range(part.pick.sessions or 1)
        ]
    if isinstance(source, RepeatSource):
        requests = [request for session in earlier.parts[source.part] for request in session]
        last = requests[-(part.pick.sessions or 1) :]
        return [
            [
                replace(
                    request, part=name, session=index, turn=0, output_tokens=part.output_tokens, think_s=0.0, at_s=None
                )
            ]
            for index, request in enumerate(last)
        ]
    if isinstance(source, ChatSource):
        return _picked(part, (("", session) for session in _chat_sessions(name, part, source, tokenizer, base)))
    if isinstance(source, TraceSource):
        sessions = _trace_sessions(name, part, source, workload.seed, tokenizer, base)
        return _picked(part, (("", session) for session in sessions))
    assert isinstance(source, FileSource | PackageSource | HubSource)
    return _picked(part, _text_sessions(name, part, source, tokenizer, base))


def _fit(sessions: list[Conversation], context: int) -> tuple[list[Conversation], int]:
    """Drop the turns of each session from the first one on that does not fit. Returns the sessions and the number of dropped turns."""
    kept, dropped = [], 0
    for session in sessions:
        fitting = list(
            itertools.takewhile(lambda request: len(request.prompt) + request.output_tokens <= context, session)
        )
        dropped += len(session) - len(fitting)
        if fitting:
            kept.append(fitting)
    return kept, dropped


def _picked(part: Part, sessions: Iterator[tuple[str, Conversation]]) -> list[Conversation]:
    """Apply `pick` and renumber the sessions. They are ordered by their group's first session, then by their own place."""
    pick = part.pick
    groups: dict[str, list[Conversation]] = {}
    wanted = (pick.groups or 0) * (pick.per_group or 0)
    for group, session in sessions:
        turns = session[: pick.turns]
        lengths = [len(request.prompt) for request in turns]
        if min(lengths) < pick.min_prompt_tokens or max(lengths) > (pick.max_prompt_tokens or max(lengths)):
            continue
        members = groups.setdefault(group, [])
        if pick.per_group is None or len(members) < pick.per_group:
            members.append(turns)
        if wanted and sum(len(found) == pick.per_group for found in groups.values()) == pick.groups:
            break
        if not part.group_by and pick.sessions and len(members) == pick.sessions:
            break
    full = [members for members in groups.values() if not pick.per_group or len(members) == pick.per_group]
    chosen = [session for members in full[: pick.groups] for session in members][: pick.sessions]
    return [[replace(request, session=index) for request in session] for index, session in enumerate(chosen)]


def _text_sessions(
    name: str, part: Part, source: FileSource | PackageSource | HubSource, tokenizer: ModelTokenizer, base: Path
) -> Iterator[tuple[str, Conversation]]:
    """(group, session) pairs, in the order in which the sessions begin."""
    assert part.session is not None
    names = _Names(part, base)
    if part.session_by:
        merged: dict[str, list[Row]] = {}
        for index, row in enumerate(read_rows(source, base)):
            if names.keep(row, index):
                merged.setdefault(str(names.value(part.session_by, row, index)), []).append(row)
        found = enumerate(merged.values())
    else:
        found = enumerate([row] for row in read_rows(source, base))
    for index, rows in found:
        if not part.session_by and not names.keep(rows[0], index):
            continue
        group = str(names.value(part.group_by, rows[0], index)) if part.group_by else ""
        timed = [
            (prompt, messages, names.seconds(part.at, row, index))
            for row in rows
            for prompt, messages in _row_prompts(part.session, names, row, index, tokenizer)
        ]
        if timed:
            yield (
                group,
                [
                    Request(name, index, turn, prompt, part.output_tokens, part.think if turn else 0.0, at_s, messages)
                    for turn, (prompt, messages, at_s) in enumerate(timed)
                ],
            )


def _row_prompts(
    session: Session, names: _Names, row: Row, index: int, tokenizer: ModelTokenizer
) -> Iterator[tuple[Tokens, tuple[Message, ...] | None]]:
    """The prompts of a row, and the messages of those that are chats."""
    if session.prompt is not None:
        yield tokenizer.encode(names.text(session.prompt, row, index)), None
        return
    assert session.turns is not None
    messages: list[Message] = []
    if session.system:
        messages.append({"role": "system", "content": names.text(session.system, row, index)})
    turns = _string_list(names.value(session.turns, row, index), "session.turns", index)
    found = names.value(session.replies, row, index) if session.replies else []
    replies = _string_list(found, "session.replies", index)
    if len(replies) < len(turns) - 1:
        raise WorkloadError(
            f"session.replies: {len(replies)} replies for {len(turns)} turns (row {index}); give one for each turn but the last"
        )
    for turn, text in enumerate(turns):
        messages.append({"role": "user", "content": text})
        yield tokenizer.encode_chat(messages), tuple(messages)
        if turn < len(replies):
            messages.append({"role": "assistant", "content": replies[turn]})


def _string_list(value: object, where: str, index: int) -> list[str]:
    if not isinstance(value, list):
        kind = type(value).__name__
        raise WorkloadError(f"{where}: the expression gives {kind} (row {index}); it must give a list of texts")
    for item in value:
        if not isinstance(item, str):
            kind = type(item).__name__
            raise WorkloadError(f"{where}: the list holds {kind} (row {index}); it must give a list of texts")
    return value


class _Names:
    """The names that templates and expressions of a part can use. Each template and expression is compiled once."""

    def __init__(self, part: Part, base: Path) -> None:
        self.part = part
        self.environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        self.documents = {
            name: read_text(source, base)
            if not isinstance(source, HubSource) and source.format == "text"
            else list(read_rows(source, base))
            for name, source in part.documents.items()
        }
        self.expressions: dict[str, Any] = {}  # Any: jinja2 types its compiled expressions loosely
        self.templates: dict[str, jinja2.Template] = {}

    def keep(self, row: Row, index: int) -> bool:
        return self.part.where is None or bool(self.value(self.part.where, row, index))

    def value(self, expression: str, row: Row, index: int) -> object:
        try:
            if expression not in self.expressions:
                self.expressions[expression] = self.environment.compile_expression(expression, undefined_to_none=False)
            value: object = self.expressions[expression](row=row, index=index, documents=self.documents)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise WorkloadError(f"expression {expression!r} fails on row {index}: {error}") from error
        if isinstance(value, jinja2.Undefined):
            raise WorkloadError(f"expression {expression!r} fails on row {index}: {value._undefined_message}")
        return value

    def seconds(self, expression: str | None, row: Row, index: int) -> float | None:
        if expression is None:
            return None
        value = self.value(expression, row, index)
        if not isinstance(value, int | float):
            raise WorkloadError(f"at: the expression gives {type(value).__name__} (row {index}); it must give seconds")
        return float(value)

    def text(self, template: str, row: Row, index: int) -> str:
        try:
            if template not in self.templates:
                self.templates[template] = self.environment.from_string(template)
            return self.templates[template].render(row=row, index=index, documents=self.documents)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise WorkloadError(f"a template fails on row {index}: {error}") from error


def _trace_sessions(
    name: str, part: Part, source: TraceSource, seed: int, tokenizer: ModelTokenizer, base: Path
) -> Iterator[Conversation]:
    def draw(count: int, kind: str, number: int) -> Tokens:
        return random_tokens(tokenizer, count, seed, kind, number)

    for index, (prompt, output, at_s) in enumerate(trace_prompts(find_file(source.path, base), source, draw)):
        limit = part.output_tokens if output is None else min(output, part.output_tokens)
        yield [Request(name, index, 0, prompt, limit, at_s=at_s)]


def _chat_sessions(
    name: str, part: Part, source: ChatSource, tokenizer: ModelTokenizer, base: Path
) -> Iterator[Conversation]:
    for index, written in enumerate(read_chats(find_file(source.path, base))):
        session = []
        for turn, asked in enumerate(written):
            prompt = (
                tokenizer.encode_chat(asked.messages, asked.tools)
                if asked.text is None
                else tokenizer.encode(asked.text)
            )
            limit = min(max(1, asked.max_tokens or part.output_tokens), part.output_tokens)
            think_s, tools = part.think if turn else 0.0, None if asked.tools is None else tuple(asked.tools)
            messages = tuple(asked.messages) or None
            session.append(Request(name, index, turn, prompt, limit, think_s, asked.at_s, messages, tools, asked.text))
        if session:
            yield session
