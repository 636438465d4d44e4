from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EngineRequest(_message.Message):
    __slots__ = ("request_id", "model", "adapter", "tenant", "prompt_token_ids", "max_tokens", "sampling_params", "options", "priority", "trace_headers", "replay_token_ids")
    class TraceHeadersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_PARAMS_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TRACE_HEADERS_FIELD_NUMBER: _ClassVar[int]
    REPLAY_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    adapter: str
    tenant: str
    prompt_token_ids: bytes
    max_tokens: int
    sampling_params: bytes
    options: bytes
    priority: int
    trace_headers: _containers.ScalarMap[str, str]
    replay_token_ids: bytes
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., adapter: _Optional[str] = ..., tenant: _Optional[str] = ..., prompt_token_ids: _Optional[bytes] = ..., max_tokens: _Optional[int] = ..., sampling_params: _Optional[bytes] = ..., options: _Optional[bytes] = ..., priority: _Optional[int] = ..., trace_headers: _Optional[_Mapping[str, str]] = ..., replay_token_ids: _Optional[bytes] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("num_running", "num_waiting", "waiting_prefill_tokens", "kv_used_blocks", "num_pinned", "num_decoding")
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITING_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_USED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_PINNED_FIELD_NUMBER: _ClassVar[int]
    NUM_DECODING_FIELD_NUMBER: _ClassVar[int]
    num_running: int
    num_waiting: int
    waiting_prefill_tokens: int
    kv_used_blocks: int
    num_pinned: int
    num_decoding: int
    def __init__(self, num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., waiting_prefill_tokens: _Optional[int] = ..., kv_used_blocks: _Optional[int] = ..., num_pinned: _Optional[int] = ..., num_decoding: _Optional[int] = ...) -> None: ...

class LogprobRows(_message.Message):
    __slots__ = ("width", "token_ids", "logprobs", "ranks")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    width: int
    token_ids: bytes
    logprobs: bytes
    ranks: bytes
    def __init__(self, width: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[bytes] = ..., ranks: _Optional[bytes] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("request_id", "token_ids", "logprobs", "prompt_logprobs", "num_cached_tokens", "finish_reason", "stop_token_id", "stop_string", "transfer", "queue_s", "prefill_s", "failure", "num_cache_creation_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    STOP_STRING_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHE_CREATION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: bytes
    logprobs: LogprobRows
    prompt_logprobs: LogprobRows
    num_cached_tokens: int
    finish_reason: str
    stop_token_id: int
    stop_string: str
    transfer: Transfer
    queue_s: float
    prefill_s: float
    failure: Failure
    num_cache_creation_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[bytes] = ..., logprobs: _Optional[_Union[LogprobRows, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[LogprobRows, _Mapping]] = ..., num_cached_tokens: _Optional[int] = ..., finish_reason: _Optional[str] = ..., stop_token_id: _Optional[int] = ..., stop_string: _Optional[str] = ..., transfer: _Optional[_Union[Transfer, _Mapping]] = ..., queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., num_cache_creation_tokens: _Optional[int] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("kind", "message")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSPECIFIED: _ClassVar[Failure.Kind]
        TRY_ELSEWHERE: _ClassVar[Failure.Kind]
        INVALID_REQUEST: _ClassVar[Failure.Kind]
        INTERNAL: _ClassVar[Failure.Kind]
    UNSPECIFIED: Failure.Kind
    TRY_ELSEWHERE: Failure.Kind
    INVALID_REQUEST: Failure.Kind
    INTERNAL: Failure.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    kind: Failure.Kind
    message: str
    def __init__(self, kind: _Optional[_Union[Failure.Kind, str]] = ..., message: _Optional[str] = ...) -> None: ...

class Transfer(_message.Message):
    __slots__ = ("outcome", "reason", "num_bytes", "pull_s")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSPECIFIED: _ClassVar[Transfer.Outcome]
        PULLED: _ClassVar[Transfer.Outcome]
        CACHED: _ClassVar[Transfer.Outcome]
        RECOMPUTED: _ClassVar[Transfer.Outcome]
    UNSPECIFIED: Transfer.Outcome
    PULLED: Transfer.Outcome
    CACHED: Transfer.Outcome
    RECOMPUTED: Transfer.Outcome
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    PULL_S_FIELD_NUMBER: _ClassVar[int]
    outcome: Transfer.Outcome
    reason: str
    num_bytes: int
    pull_s: float
    def __init__(self, outcome: _Optional[_Union[Transfer.Outcome, str]] = ..., reason: _Optional[str] = ..., num_bytes: _Optional[int] = ..., pull_s: _Optional[float] = ...) -> None: ...

class KvHandle(_message.Message):
    __slots__ = ("body", "mac")
    BODY_FIELD_NUMBER: _ClassVar[int]
    MAC_FIELD_NUMBER: _ClassVar[int]
    body: bytes
    mac: bytes
    def __init__(self, body: _Optional[bytes] = ..., mac: _Optional[bytes] = ...) -> None: ...

class KvHandleBody(_message.Message):
    __slots__ = ("incarnation", "address", "model", "revision", "adapter", "tenant", "num_tokens", "token_digest", "block_size_tokens", "tp_size", "kv_layout", "engine_request_id", "expires_at_s", "connector_params")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    KV_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    ENGINE_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_S_FIELD_NUMBER: _ClassVar[int]
    CONNECTOR_PARAMS_FIELD_NUMBER: _ClassVar[int]
    incarnation: str
    address: str
    model: str
    revision: str
    adapter: str
    tenant: str
    num_tokens: int
    token_digest: bytes
    block_size_tokens: int
    tp_size: int
    kv_layout: str
    engine_request_id: str
    expires_at_s: float
    connector_params: bytes
    def __init__(self, incarnation: _Optional[str] = ..., address: _Optional[str] = ..., model: _Optional[str] = ..., revision: _Optional[str] = ..., adapter: _Optional[str] = ..., tenant: _Optional[str] = ..., num_tokens: _Optional[int] = ..., token_digest: _Optional[bytes] = ..., block_size_tokens: _Optional[int] = ..., tp_size: _Optional[int] = ..., kv_layout: _Optional[str] = ..., engine_request_id: _Optional[str] = ..., expires_at_s: _Optional[float] = ..., connector_params: _Optional[bytes] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("request", "keep_kv")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    KEEP_KV_FIELD_NUMBER: _ClassVar[int]
    request: EngineRequest
    keep_kv: bool
    def __init__(self, request: _Optional[_Union[EngineRequest, _Mapping]] = ..., keep_kv: _Optional[bool] = ...) -> None: ...

class PrefillReply(_message.Message):
    __slots__ = ("delta", "kv_handle", "load", "refused", "first_token_void")
    DELTA_FIELD_NUMBER: _ClassVar[int]
    KV_HANDLE_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_VOID_FIELD_NUMBER: _ClassVar[int]
    delta: Delta
    kv_handle: KvHandle
    load: Load
    refused: str
    first_token_void: bool
    def __init__(self, delta: _Optional[_Union[Delta, _Mapping]] = ..., kv_handle: _Optional[_Union[KvHandle, _Mapping]] = ..., load: _Optional[_Union[Load, _Mapping]] = ..., refused: _Optional[str] = ..., first_token_void: _Optional[bool] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("request_ids",)
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, request_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RenewLeasesRequest(_message.Message):
    __slots__ = ("engine_request_ids",)
    ENGINE_REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    engine_request_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, engine_request_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class RenewLeasesReply(_message.Message):
    __slots__ = ("now_s", "expires_at_s", "incarnation", "connector_peer")
    class ExpiresAtSEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NOW_S_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_S_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    CONNECTOR_PEER_FIELD_NUMBER: _ClassVar[int]
    now_s: float
    expires_at_s: _containers.ScalarMap[str, float]
    incarnation: str
    connector_peer: bytes
    def __init__(self, now_s: _Optional[float] = ..., expires_at_s: _Optional[_Mapping[str, float]] = ..., incarnation: _Optional[str] = ..., connector_peer: _Optional[bytes] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("router_id",)
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    def __init__(self, router_id: _Optional[str] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("deltas", "load")
    DELTAS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    deltas: _containers.RepeatedCompositeFieldContainer[Delta]
    load: Load
    def __init__(self, deltas: _Optional[_Iterable[_Union[Delta, _Mapping]]] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("router_id", "request_id", "num_tokens")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    request_id: str
    num_tokens: int
    def __init__(self, router_id: _Optional[str] = ..., request_id: _Optional[str] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class ReserveReply(_message.Message):
    __slots__ = ("refused", "load")
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    refused: str
    load: Load
    def __init__(self, refused: _Optional[str] = ..., load: _Optional[_Union[Load, _Mapping]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("router_id", "request", "kv_handle")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    KV_HANDLE_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    request: EngineRequest
    kv_handle: KvHandle
    def __init__(self, router_id: _Optional[str] = ..., request: _Optional[_Union[EngineRequest, _Mapping]] = ..., kv_handle: _Optional[_Union[KvHandle, _Mapping]] = ...) -> None: ...

class GenerateReply(_message.Message):
    __slots__ = ("refused",)
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    refused: str
    def __init__(self, refused: _Optional[str] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("router_id", "request_ids")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, router_id: _Optional[str] = ..., request_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class AbortReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchCacheRequest(_message.Message):
    __slots__ = ("router_id", "incarnation", "known_seq")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    KNOWN_SEQ_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    incarnation: str
    known_seq: int
    def __init__(self, router_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., known_seq: _Optional[int] = ...) -> None: ...

class CacheDelta(_message.Message):
    __slots__ = ("after_seq", "seq", "reset", "stored", "removed")
    AFTER_SEQ_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    RESET_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    after_seq: int
    seq: int
    reset: bool
    stored: bytes
    removed: bytes
    def __init__(self, after_seq: _Optional[int] = ..., seq: _Optional[int] = ..., reset: _Optional[bool] = ..., stored: _Optional[bytes] = ..., removed: _Optional[bytes] = ...) -> None: ...
