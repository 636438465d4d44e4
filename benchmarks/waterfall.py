"""Where each millisecond goes on the way to the first token, and from there to the second.

Every process of the machine reads the same monotonic clock, so the client's times and those in the
router's trace of the request (``/baton/requests/<id>``) lie on one line. What two stamps enclose but
no stamp divides is divided by a probe taken between the requests: an empty HTTP request through
HAProxy, an empty gRPC call to the prefill worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.answers import Answer
from benchmarks.latency import OUTPUT_TOKENS
from benchmarks.load import LoadGenerator
from benchmarks.model import PromptMaker
from benchmarks.table import Table, median, ms
from deploy.cluster import fetch_status

PROMPT_TOKENS = (200, 800, 2500)
REQUESTS, QUICK_REQUESTS = 20, 6
_WARM_UP = 2


def measure(
    load: LoadGenerator,
    prompts: PromptMaker,
    url: str,
    port: int,
    requests: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Medians in seconds, by prompt length: the stretches before the first and before the second token."""
    (prefill,) = [worker for worker in fetch_status(url)["workers"] if worker["role"] == "prefill"]
    result = {}
    with httpx.Client() as client, grpc.insecure_channel(prefill["address"]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for num_tokens in PROMPT_TOKENS:
            rows: list[dict[str, dict[str, float]]] = []
            for index in range(requests + _WARM_UP):
                progress(f"waterfall: {num_tokens} prompt tokens, request {index + 1}")
                (answer,) = load.run(port, [prompts.chat(num_tokens, max_tokens=OUTPUT_TOKENS)])
                trace = client.get(f"{url}/baton/requests/{answer.request_id}").raise_for_status().json()
                if trace["kv_outcome"] != "pulled" or trace["path"] != "remote_early":
                    raise RuntimeError(f"not disaggregated: {trace}")
                http_s = median(a.end_s - a.sent_s for a in load.run(port, [{}] * 5, path="/health"))
                rows.append(_stretches(answer, trace, http_s, _grpc_round_trip_s(health)))
            rows = rows[_WARM_UP:]
            result[str(num_tokens)] = {
                part: {name: median(row[part][name] for row in rows) for name in rows[0][part]}
                for part in rows[0]
            }
    return result


def _grpc_round_trip_s(health: health_pb2_grpc.HealthStub) -> float:
    times_s = []
    for _ in range(5):
        start_s = time.monotonic()
        health.Check(health_pb2.HealthCheckRequest())
        times_s.append(time.monotonic() - start_s)
    return median(times_s)


TTFT, SECOND = "to the first token", "from the first to the second token"
TOTAL = "client"


def _stretches(
    answer: Answer, trace: Mapping[str, Any], http_s: float, grpc_s: float
) -> dict[str, dict[str, float]]:
    sent_s, first_s, second_s = answer.sent_s, answer.token_at_s[0], answer.token_at_s[1]
    rpc_s = trace["prefill_done_at_s"] - trace["prefill_sent_at_s"]
    in_engine_s = trace["prefill_queue_s"] + trace["prefill_s"]
    # The pull counts as queueing in the engine.
    waited_s = trace["first_decode_at_s"] - trace["handoff_sent_at_s"]
    queued_s = trace["decode_queue_s"]
    return {
        TTFT: {
            "HTTP and HAProxy, both ways": http_s,
            "chat template, tokenization, validation": trace["received_at_s"] - sent_s - http_s / 2,
            "routing": trace["prefill_sent_at_s"] - trace["received_at_s"],
            "gRPC to the prefill worker and back": grpc_s,
            "worker: engine's front end, KV handle": rpc_s - in_engine_s - grpc_s,
            "prefill queue": trace["prefill_queue_s"],
            "prefill": trace["prefill_s"],
            "decode worker's reservation": trace["first_token_at_s"] - trace["prefill_done_at_s"],
            "detokenization, server-sent event": first_s - trace["first_token_at_s"] - http_s / 2,
            TOTAL: first_s - sent_s,
        },
        SECOND: {
            "router": trace["handoff_sent_at_s"] - trace["first_token_at_s"],
            "KV pull": trace["kv_pull_s"],
            "decode engine's queue beside the pull": queued_s - trace["kv_pull_s"],
            "gRPC, worker, first decode step": waited_s - queued_s,
            "the first token's own way out, saved": trace["first_token_at_s"] - first_s,
            "detokenization, server-sent event, HAProxy": second_s - trace["first_decode_at_s"],
            TOTAL: second_s - first_s,
        },
    }


def tables(result: Mapping[str, Any]) -> list[Table]:
    return [_table(result, TTFT), _table(result, SECOND)]


def _table(result: Mapping[str, Any], part: str) -> Table:
    columns: Sequence[Mapping[str, float]] = [by_part[part] for by_part in result.values()]
    names = [name for name in columns[0] if name != TOTAL]
    rows = [[name, *(ms(column[name]) for column in columns)] for name in names]
    rest = [column[TOTAL] - sum(column[name] for name in names) for column in columns]
    rows.append(["unattributed (medians do not add up exactly)", *map(ms, rest)])
    rows.append([f"**{TOTAL}**", *(f"**{ms(column[TOTAL])}**" for column in columns)])
    return Table(f"Time {part}, ms", ["stretch", *(f"{length} tokens" for length in result)], rows)
