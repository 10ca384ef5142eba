"""What a client may ask of the cache for one request: the field "lmc" of vLLM's kv_transfer_params or SGLang's custom_params."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, ValidationError

logger = logging.getLogger(__name__)


class RequestControl(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    bypass: bool = False
    """Neither load nor store."""
    store: bool = True
    """Store what is computed."""
    tenant: str = ""
    """Share with this tenant's requests only; none: the instance's tenant."""
    pin_seconds: float = 0.0
    """Seconds for which the prompt's chunks are kept from eviction after the request."""
    explain: bool = False
    """Answer with where the hit came from and why it ended there."""


_NO_WISHES = RequestControl()


def parse_control(
    parameters: Mapping[str, object] | None, request_id: str, field: str = "kv_transfer_params"
) -> RequestControl:
    """A request cannot be refused here; one whose wishes are unclear bypasses the cache, with a warning."""
    wishes = (parameters or {}).get("lmc")
    if wishes is None:
        return _NO_WISHES
    try:
        return RequestControl.model_validate(wishes)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "lmc"
        logger.warning("lmc: request %s bypasses the cache: %s lmc.%s: %s", request_id, field, where, first["msg"])
        return RequestControl(bypass=True)


def tenant_name(tenant: str, salt: str | None) -> str:
    """The tenant that a request shares with. A tenant that looks like a tenant and a salt is none."""
    if salt:
        return json.dumps([tenant, salt])
    return json.dumps([tenant]) if tenant.startswith("[") else tenant
