"""KV handles: what a decode worker needs to pull a prompt's KV, tied to the exact tokens.

A handle is minted by the prefill worker, carried by the router without being read, and checked by the
decode worker. Everything that could make the pulled KV belong to other tokens, another model or
another engine start is inside the signed body; what does not match is recomputed, never guessed.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from dataclasses import dataclass
from typing import Any

import msgspec
from google.protobuf.message import DecodeError

from baton_proto import worker_pb2
from baton_proto.codecs import TOKEN_BYTES
from core.errors import KvHandleError
from kv_transfer.params import check_connector_params

MIN_KEY_BYTES = 16
_DIGEST_BYTES = 16
_MAX_HANDLE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class KvIdentity:
    """What two workers must share before KV of one may be used by the other."""

    model: str
    revision: str
    block_size_tokens: int
    kv_layout: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KvScope:
    """Whose KV it is: one prompt of one adapter and tenant."""

    adapter: str
    tenant: str


@dataclass(frozen=True, slots=True, kw_only=True)
class KvHandle:
    """A checked handle."""

    incarnation: str
    address: str
    num_tokens: int
    tp_size: int
    engine_request_id: str
    expires_at_s: float
    """End of the lease on the prefill node's monotonic clock."""
    connector_params: dict[str, Any]


def token_digest(packed_tokens: bytes, scope: KvScope) -> bytes:
    """BLAKE2b of the scope and the tokens: 16 bytes.

    Args:
        packed_tokens: token ids as they travel, little-endian uint32.
    """
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in (scope.adapter, scope.tenant):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(4, "little"))
        digest.update(encoded)
    digest.update(packed_tokens)
    return digest.digest()


class KvHandleCodec:
    """Mints and checks handles under one cluster key.

    Args:
        cluster_key: at least 16 random bytes, the same on every worker of the cluster.
        identity: this worker's; minted into handles and demanded of them.
    """

    def __init__(self, cluster_key: bytes, identity: KvIdentity) -> None:
        if len(cluster_key) < MIN_KEY_BYTES:
            raise ValueError(f"the cluster key needs at least {MIN_KEY_BYTES} bytes")
        self._key = cluster_key
        self._identity = identity

    def mint(self, handle: KvHandle, packed_prompt: bytes, scope: KvScope) -> worker_pb2.KvHandle:
        """Signs ``handle`` for exactly the first ``handle.num_tokens`` tokens of the prompt."""
        body = worker_pb2.KvHandleBody(
            incarnation=handle.incarnation,
            address=handle.address,
            model=self._identity.model,
            revision=self._identity.revision,
            adapter=scope.adapter,
            tenant=scope.tenant,
            num_tokens=handle.num_tokens,
            token_digest=token_digest(packed_prompt[: handle.num_tokens * TOKEN_BYTES], scope),
            block_size_tokens=self._identity.block_size_tokens,
            tp_size=handle.tp_size,
            kv_layout=self._identity.kv_layout,
            engine_request_id=handle.engine_request_id,
            expires_at_s=handle.expires_at_s,
            connector_params=msgspec.msgpack.encode(handle.connector_params),
        ).SerializeToString()
        return worker_pb2.KvHandle(body=body, mac=self._mac(body))

    def check(self, message: worker_pb2.KvHandle, packed_prompt: bytes, scope: KvScope) -> KvHandle:
        """Returns the handle if it fits this worker and this prompt.

        Raises:
            KvHandleError: with reason ``oversized``, ``forged``, ``malformed``, ``other_model``,
                ``other_scope``, ``other_layout`` or ``other_tokens``.
        """
        if len(message.body) > _MAX_HANDLE_BYTES:
            raise KvHandleError("oversized", f"KV handle of {len(message.body)} bytes")
        if not hmac.compare_digest(self._mac(message.body), message.mac):
            raise KvHandleError("forged", "KV handle is not signed with this cluster's key")
        try:
            body = worker_pb2.KvHandleBody.FromString(message.body)
            connector_params = msgspec.msgpack.decode(body.connector_params, type=dict[str, Any])
        except (DecodeError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise KvHandleError("malformed", f"KV handle does not decode: {error}") from error
        mine = self._identity
        if (body.model, body.revision) != (mine.model, mine.revision):
            raise KvHandleError("other_model", f"KV of {body.model!r}, this worker runs {mine.model!r}")
        if (body.adapter, body.tenant) != (scope.adapter, scope.tenant):
            raise KvHandleError("other_scope", "KV of another adapter or tenant")
        if (body.block_size_tokens, body.kv_layout) != (mine.block_size_tokens, mine.kv_layout):
            raise KvHandleError(
                "other_layout",
                f"KV in blocks of {body.block_size_tokens} tokens, layout {body.kv_layout}; "
                f"this worker has {mine.block_size_tokens}, {mine.kv_layout}",
            )
        covered = packed_prompt[: body.num_tokens * TOKEN_BYTES]
        if not (0 < len(covered) == body.num_tokens * TOKEN_BYTES) or not hmac.compare_digest(
            body.token_digest, token_digest(covered, scope)
        ):
            raise KvHandleError("other_tokens", "KV of other tokens than this prompt's")
        # Signed, so it comes from a worker of this cluster; that one may still be wrong about something.
        if body.tp_size < 1 or not math.isfinite(body.expires_at_s):
            raise KvHandleError("malformed", f"TP {body.tp_size}, lease until {body.expires_at_s}")
        try:
            check_connector_params(connector_params, body.num_tokens)
        except ValueError as error:
            raise KvHandleError("malformed", str(error)) from error
        return KvHandle(
            incarnation=body.incarnation,
            address=body.address,
            num_tokens=body.num_tokens,
            tp_size=body.tp_size,
            engine_request_id=body.engine_request_id,
            expires_at_s=body.expires_at_s,
            connector_params=connector_params,
        )

    def _mac(self, body: bytes) -> bytes:
        return hmac.digest(self._key, body, "sha256")
