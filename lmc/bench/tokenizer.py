"""Turns text into token ids with the model's own tokenizer and chat template, without an engine or transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray

from lmc.errors import ModelError, WorkloadError

Tokens = NDArray[np.int32]
Message = dict[str, Any]  # Any: a message of OpenAI's chat API; role and content are text, tool calls are objects


@dataclass(frozen=True)
class ModelTokenizer:
    """`ordinary` are the ids that stand for text: random prompts are drawn from them."""

    backend: Any  # tokenizers.Tokenizer, a compiled package without types
    template: jinja2.Template | None
    special: dict[str, str]
    ordinary: Tokens

    @classmethod
    def load(cls, folder: Path) -> ModelTokenizer:
        """Read tokenizer.json and the chat template of a model folder. Raises ModelError."""
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{path}: no such file; give a model folder with config.json, tokenizer.json and weights")
        backend = Tokenizer.from_file(str(path))
        settings = _read_json(folder / "tokenizer_config.json")
        special = {
            name: token if isinstance(token, str) else token["content"]
            for name, token in settings.items()
            if name.endswith("_token") and isinstance(token, str | dict)
        }
        added = set(backend.get_added_tokens_decoder())
        ordinary = np.array(sorted(set(backend.get_vocab().values()) - added), dtype=np.int32)
        return cls(backend, _chat_template(folder, settings), special, ordinary)

    def encode(self, text: str, add_special: bool = True) -> Tokens:
        return np.array(self.backend.encode(text, add_special_tokens=add_special).ids, dtype=np.int32)

    def decode(self, tokens: Tokens) -> str:
        text: str = self.backend.decode(tokens.tolist(), skip_special_tokens=False)
        return text

    def encode_chat(self, messages: list[Message], tools: list[Any] | None = None) -> Tokens:
        """The prompt that asks for the next assistant message. Raises WorkloadError if the model has no chat template."""
        if self.template is None:
            raise WorkloadError("the model has no chat template; use session.prompt, or a model that has one")
        try:
            text = self.template.render(messages=messages, tools=tools, add_generation_prompt=True, **self.special)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise WorkloadError(f"the model's chat template refuses the messages: {error}") from error
        return self.encode(text, add_special=False)


def _read_json(path: Path) -> dict[str, Any]:  # Any: the model's own settings
    if not path.is_file():
        return {}
    value = json.loads(path.read_text())
    return value if isinstance(value, dict) else {}


def _chat_template(folder: Path, settings: dict[str, Any]) -> jinja2.Template | None:
    file = folder / "chat_template.jinja"
    source = file.read_text() if file.is_file() else settings.get("chat_template")
    if not isinstance(source, str):
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now(UTC).strftime(form)
    return environment.from_string(source)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
