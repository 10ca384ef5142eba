"""The edge: what clients send along with a request is checked here, once, before anything of lmc sees it.

A client may wish for something in the field "lmc" of vLLM's kv_transfer_params or SGLang's custom_params. The settings clients.* say which
wishes are honoured; a request that brings admin.token is the operator's, and may wish for all. A request cannot be refused here: one whose
wishes are malformed, or that cannot be kept apart from others as it wishes, bypasses the cache, with a warning.
"""

from __future__ import annotations

import hmac
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lmc.cache.config import CacheConfig
from lmc.cache.keys import hashed_name
from lmc.cache.observe.logs import Sparingly
from lmc.cache.plan import request_name, shown

logger = logging.getLogger(__name__)

MOST_TENANT = 256  # characters
_MOST_CLASS = 64
_MOST_TOKEN = 4096


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is granted to a request."""

    bypass: bool = False  # neither load nor store
    store: bool = True  # what is computed
    tenant: str = ""  # share with this tenant's requests only, by its hashed name; empty: the instance's tenant
    pin_seconds: float = 0.0  # for which the prompt's chunks are kept from eviction after the request
    explain: bool = False  # answer with where the hit came from, and why it ended there
    request_class: str = ""  # what the policy may learn from, and the record holds
    session: str = ""  # for the record


_NO_WISHES = Wishes()
_BYPASS = Wishes(bypass=True)


@dataclass
class Edge:
    """source: the field of a request in which clients wish. no_tenants: why they cannot name a tenant there, if they can't."""

    config: CacheConfig
    source: str
    no_tenants: str = ""
    _sparingly: Sparingly = field(default_factory=Sparingly)

    def read(self, parameters: object, request_id: str, *names: object) -> Wishes:
        """parameters: what the engine has in that field. names: the request's salts, if any. What is not granted is said in the log."""
        wishes = parameters.get("lmc") if isinstance(parameters, dict) else parameters
        problem = (
            "" if all(name is None or _is_text(name) for name in names) else "its cache_salt or extra_key is no text"
        )
        if wishes is None and not problem:
            return _NO_WISHES
        if isinstance(wishes, dict):
            problem = problem or _malformed(wishes, self.source)
            granted, problem = (_BYPASS, problem) if problem else self._grant(wishes)
        else:
            granted, problem = _BYPASS, problem or f"{self.source}.lmc must be an object"
        if problem:
            name = request_name(request_id)
            verb = "bypasses the cache" if granted.bypass else "gets less than it wishes for"
            self._sparingly.warn(logger, "wishes", f"request {name} {verb}: {problem}", request=name)
        return granted

    def _grant(self, wishes: Mapping[str, object]) -> tuple[Wishes, str]:
        """What a well-formed request gets, and what it does not get."""
        allowed, token, secret = self.config.clients, wishes.get("token"), self.config.admin.token
        operator = (
            isinstance(token, str) and secret is not None and hmac.compare_digest(token.encode(), secret.encode())
        )
        tenant = str(wishes.get("tenant") or "")
        if tenant and self.no_tenants:
            return _BYPASS, self.no_tenants
        if tenant not in ("", self.config.tenant) and not (allowed.tenant or operator):
            return _BYPASS, "clients may not name a tenant (clients.tenant)"
        refused = [] if token is None or operator else ["token is not admin.token"]

        def honoured(wish: str, wished: bool, setting: bool, why: str) -> bool:
            if wished and not (setting or operator):
                refused.append(f"{wish} {why}")
                return False
            return wished

        pin_seconds = float(wishes.get("pin_seconds") or 0.0)  # type: ignore[arg-type]  # a number, as _malformed has checked
        pinned = honoured("pin_seconds", pin_seconds > 0, allowed.pin, "is not honoured (clients.pin)")
        granted = Wishes(
            bypass=honoured("bypass", bool(wishes.get("bypass")), allowed.bypass, "is not honoured (clients.bypass)"),
            store=not honoured("store", wishes.get("store") is False, allowed.store, "is not honoured (clients.store)"),
            tenant=hashed_name(tenant),
            pin_seconds=pin_seconds if pinned else 0.0,
            request_class=str(wishes.get("class") or ""),
            session=str(wishes.get("session") or ""),
            explain=honoured("explain", bool(wishes.get("explain")), False, "needs admin.token as token"),
        )
        return granted, "; ".join(refused)


def _malformed(wishes: Mapping[object, object], source: str) -> str:
    """What is wrong with the form of a client's wishes; empty if nothing is. Each is a flag, a number or a short text: nothing is deep."""
    for key, value in wishes.items():
        where = f"{source}.lmc.{shown(key) if isinstance(key, str) else type(key).__name__}"
        if not isinstance(key, str) or key not in _FORMS:
            return f"{where} is not known"
        if (form := _FORMS[key](value)) is not None:
            return f"{where} must be {form}"
    return ""


def _flag(value: object) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _seconds(value: object) -> str | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            if math.isfinite(value) and value >= 0:
                return None
        except OverflowError:
            pass
    return "a number of seconds"


def _text(value: object, most: int) -> str | None:
    short = isinstance(value, str) and len(value) <= most
    return None if short and _is_text(value) else f"a text of at most {most} characters"


def _is_text(value: object) -> bool:
    """Lone surrogates are none: nobody can write them down, engines neither."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _word(value: object) -> str | None:
    """No content of prompts: it is recorded as it is."""
    fits = isinstance(value, str) and re.fullmatch(rf"[A-Za-z0-9_.-]{{1,{_MOST_CLASS}}}", value)
    return None if fits else f"a word of at most {_MOST_CLASS} letters, digits, _, . and -"


_FORMS: dict[str, Callable[[object], str | None]] = {
    "bypass": _flag,
    "store": _flag,
    "explain": _flag,
    "pin_seconds": _seconds,
    "class": _word,
    "session": lambda value: _text(value, MOST_TENANT),
    "tenant": lambda value: _text(value, MOST_TENANT),
    "token": lambda value: _text(value, _MOST_TOKEN),
}
