"""Between Baton's engine interface and vLLM's own types."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from vllm.logprobs import FlatLogprobs
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from engine.base import EngineDelta, EngineRequest, LogprobRows


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Arguments of AsyncLLM.generate beside prompt and sampling parameters."""

    prompt: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)


def _encode_foreign(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    raise TypeError(f"cannot send a {type(value).__name__} to a worker")


def _decode_foreign(type_: type, value: Any) -> Any:
    if type_ is np.ndarray:
        return np.asarray(value)
    raise TypeError(f"cannot decode a {type_.__name__}")


_params_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_foreign)


def encode_sampling_params(params: SamplingParams) -> bytes:
    """Every field of the parameters, private ones too."""
    return _params_encoder.encode(params)


def encode_options(
    *,
    lora: LoRARequest | None = None,
    cache_salt: str | None = None,
    reasoning_ended: bool | None = None,
    reasoning_parser_kwargs: dict[str, Any] | None = None,
) -> bytes:
    """Empty when there is nothing but defaults."""
    options: dict[str, Any] = {}
    if lora is not None:
        options["lora"] = [lora.lora_name, _adapter_id(lora), lora.lora_path]
    if cache_salt:
        options["cache_salt"] = cache_salt
    if reasoning_ended is not None:
        options["reasoning_ended"] = reasoning_ended
    if reasoning_parser_kwargs:
        options["reasoning_parser_kwargs"] = reasoning_parser_kwargs
    return _params_encoder.encode(options) if options else b""


def _adapter_id(lora: LoRARequest) -> int:
    """The same on every router and after every update: engines tell adapters apart by this number alone."""
    digest = hashlib.blake2b(f"{lora.lora_name}\0{lora.lora_path}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF or 1


class RequestDecoder:
    """Turns engine requests into arguments of AsyncLLM.generate."""

    def __init__(self) -> None:
        self._params = msgspec.msgpack.Decoder(SamplingParams, dec_hook=_decode_foreign)

    def decode(self, request: EngineRequest) -> tuple[SamplingParams, EngineOptions]:
        """
        Raises:
            ValueError: the request's parameters do not decode.
        """
        try:
            params = self._params.decode(request.sampling_params)
            options = msgspec.msgpack.decode(request.options) if request.options else {}
        except msgspec.DecodeError as error:
            raise ValueError(f"sampling parameters do not decode: {error}") from error
        params.max_tokens = request.max_tokens
        params.detokenize = False
        params.output_kind = RequestOutputKind.DELTA
        params.flat_logprobs = True
        params.skip_clone = True
        extra = {k: v for k, v in (params.extra_args or {}).items() if k != "kv_transfer_params"}
        if request.kv_params is not None:
            extra["kv_transfer_params"] = dict(request.kv_params)
        params.extra_args = extra or None
        arguments = {
            key: options[key] for key in ("reasoning_ended", "reasoning_parser_kwargs") if key in options
        }
        if "lora" in options:
            arguments["lora_request"] = LoRARequest(*options["lora"])
        prompt = {"cache_salt": options["cache_salt"]} if "cache_salt" in options else {}
        return params, EngineOptions(prompt=prompt, arguments=arguments)


def delta_from_output(output: RequestOutput, *, first: bool) -> EngineDelta:
    """What a DELTA output with flat logprobs says; queue and prefill times with the first one only."""
    completion = output.outputs[0]
    stats = output.metrics if first else None
    return EngineDelta(
        token_ids=completion.token_ids,
        logprobs=_rows(completion.logprobs) if completion.logprobs else None,
        prompt_logprobs=_rows(output.prompt_logprobs[1:]) if output.prompt_logprobs else None,
        num_cached_tokens=output.num_cached_tokens if first else None,
        num_cache_creation_tokens=output.num_cache_creation_tokens if first else None,
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        kv_params=output.kv_transfer_params,
        queue_s=stats.scheduled_ts - stats.queued_ts if stats else None,
        prefill_s=stats.first_token_ts - stats.scheduled_ts if stats else None,
    )


def _rows(flat: FlatLogprobs) -> LogprobRows:
    sizes = [end - start for start, end in zip(flat.start_indices, flat.end_indices, strict=True)]
    width = max(sizes, default=0)
    token_ids = np.array(flat.token_ids, dtype=np.int32)
    logprobs = np.array(flat.logprobs, dtype=np.float32)
    ranks = np.array(flat.ranks, dtype=np.int32)
    if min(sizes, default=0) < width:
        whole = np.concatenate([_whole_row(flat, row, width) for row in range(len(sizes))])
        token_ids, logprobs, ranks = token_ids[whole], logprobs[whole], ranks[whole]
    shape = (len(sizes), width)
    return LogprobRows(
        token_ids=token_ids.reshape(shape),
        logprobs=logprobs.reshape(shape),
        ranks=ranks.reshape(shape)[:, 0] if sizes else ranks,
    )


def _whole_row(flat: FlatLogprobs, row: int, width: int) -> list[int]:
    """Where a row's entries stand, the sampled token first.

    A reader that lags gets two deltas as one, and vLLM merges their logprobs by way of dicts: a sampled
    token that is also a candidate then stands there once.
    """
    entries = range(flat.start_indices[row], flat.end_indices[row])
    if len(entries) == width:
        return list(entries)
    return [entries[0], *sorted(entries, key=lambda index: flat.ranks[index] or 0)]
