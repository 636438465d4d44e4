"""What a request's headers say beside its body, carried in the request's own context.

X-Baton-Tenant        who it belongs to; without it, its API key stands for its owner
X-Baton-TTFT-SLO-Ms   its own target for the time to the first token, in place of the model's
X-Baton-TPOT-SLO-Ms   its own target for the time per output token
X-Baton-Explain       1: note what each routing decision was made from
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass

_MAX_TENANT_CHARS = 64
_TENANT = b"x-baton-tenant"
_AUTHORIZATION = b"authorization"
_TTFT_SLO = b"x-baton-ttft-slo-ms"
_TPOT_SLO = b"x-baton-tpot-slo-ms"
_EXPLAIN = b"x-baton-explain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """An answer that was not begun: what the client is told instead."""

    status: int
    message: str
    retry_after_s: float | None = None


@dataclass(slots=True, kw_only=True)
class RequestContext:
    """One HTTP request; shared by everything that runs for it."""

    tenant: str = ""
    """As the client calls itself; a metrics label."""
    owner: str = ""
    """Whose fair share the request is counted on: the tenant, or a digest of the API key."""
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    explain: bool = False
    refusal: Refusal | None = None
    """Set when the request has failed or was turned away; it counts until the answer's first byte."""


_context: ContextVar[RequestContext | None] = ContextVar("baton_request", default=None)


def current_request() -> RequestContext:
    """The request being served; an empty one outside of any."""
    return _context.get() or RequestContext()


def enter_request(headers: Iterable[tuple[bytes, bytes]]) -> RequestContext:
    """Begins a request: from now on :func:`current_request` gives it, in this context and those made from it.

    Args:
        headers: names in lower case, as ASGI has them.

    Raises:
        ValueError: a header has a value that means nothing.
    """
    values = dict(headers)
    tenant = values.get(_TENANT, b"").decode("latin-1")[:_MAX_TENANT_CHARS]
    key = values.get(_AUTHORIZATION, b"")
    request = RequestContext(
        tenant=tenant,
        owner=tenant or (hashlib.blake2b(key, digest_size=8).hexdigest() if key else ""),
        ttft_slo_s=_seconds(values, _TTFT_SLO),
        tpot_slo_s=_seconds(values, _TPOT_SLO),
        explain=values.get(_EXPLAIN, b"").lower() in (b"1", b"true"),
    )
    _context.set(request)
    return request


def _seconds(values: dict[bytes, bytes], name: bytes) -> float | None:
    text = values.get(name)
    if text is None:
        return None
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds < math.inf:
        raise ValueError(f"{name.decode()}: must be milliseconds above 0, not {text.decode('latin-1')!r}")
    return milliseconds / 1000
