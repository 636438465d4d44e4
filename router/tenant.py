"""Who a request belongs to: the X-Baton-Tenant header, carried in the request's own context."""

from __future__ import annotations

from contextvars import ContextVar

TENANT_HEADER = b"x-baton-tenant"
_tenant: ContextVar[str] = ContextVar("baton_tenant", default="")
_MAX_TENANT_CHARS = 64


def set_tenant(header_value: bytes) -> None:
    """Remembers the tenant for everything that runs in this request's context."""
    _tenant.set(header_value.decode("latin-1")[:_MAX_TENANT_CHARS])


def current_tenant() -> str:
    return _tenant.get()
