"""What is read from a request's headers."""

from __future__ import annotations

import contextvars

import pytest

from router.request_context import RequestContext, current_request, enter_request


def entered(**headers: str) -> RequestContext:
    """In a context of its own, as each HTTP request has one."""
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return contextvars.copy_context().run(enter_request, pairs)


def test_without_headers_there_is_nothing() -> None:
    assert entered() == RequestContext()
    assert current_request() == RequestContext()


def test_what_runs_for_the_request_shares_it() -> None:
    def serve() -> None:
        request = enter_request([(b"x-baton-tenant", b"blue")])
        assert contextvars.copy_context().run(current_request) is request

    contextvars.copy_context().run(serve)


def test_targets_are_milliseconds() -> None:
    request = entered(x_baton_ttft_slo_ms="250", x_baton_tpot_slo_ms="12.5")
    assert (request.ttft_slo_s, request.tpot_slo_s) == (0.25, 0.0125)


@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "nan", "inf"])
@pytest.mark.parametrize("header", ["x_baton_ttft_slo_ms", "x_baton_tpot_slo_ms"])
def test_targets_that_mean_nothing_are_named(header: str, value: str) -> None:
    with pytest.raises(ValueError, match=header.replace("_", "-")):
        entered(**{header: value})


def test_a_tenant_shares_under_its_name_and_a_key_under_its_digest() -> None:
    named = entered(x_baton_tenant="blue", authorization="Bearer secret")
    assert (named.tenant, named.owner) == ("blue", "blue")
    keyed, other = entered(authorization="Bearer secret"), entered(authorization="Bearer other")
    assert keyed.tenant == ""
    assert keyed.owner not in ("", other.owner)
    assert "secret" not in keyed.owner
    assert len(entered(x_baton_tenant="x" * 1000).tenant) == 64


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_a_client_may_ask_for_reasons(value: str, expected: bool) -> None:
    assert entered(x_baton_explain=value).explain is expected
