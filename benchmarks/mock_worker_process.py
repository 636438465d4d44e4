"""A worker without Ray and without a model: the real legs over a mock engine, in a process of its own."""

from __future__ import annotations

import argparse

import grpc
from prometheus_client import CollectorRegistry

from baton_proto import worker_pb2_grpc
from benchmarks.stream_transport import StreamLeg
from core.clock import MonotonicClock
from core.performance_model import LinearStepTime
from core.worker_events import WorkerModelConfig
from decode_workers.lease_keeper import LeaseKeeper
from deploy.settings import LOOPBACK
from engine.gate import Gate
from engine.mock_engine import MockEngine, MockEngineConfig
from kv_transfer.handle import KvHandleCodec, KvIdentity
from kv_transfer.peer import KvPeerAddress
from prefill_workers.leg import PrefillLeg, PrefillLegConfig
from telemetry.worker_metrics import WorkerMetrics

MODEL = "bench"
_KEY = b"of no secrecy here"
_LEASE_S = 2.0
_MAX_REQUESTS = 4096
_TOKEN_IDS = (300, 2000)
"""Inside the benchmark model's vocabulary, above its special tokens."""


async def _serve(incarnation: str, step_ms: float) -> None:
    clock, block_size = MonotonicClock(), 16
    engine = MockEngine(
        MockEngineConfig(
            incarnation=incarnation,
            model=MODEL,
            worker=WorkerModelConfig(
                num_kv_blocks=1_000_000, block_size_tokens=block_size, max_num_seqs=1024, lease_s=_LEASE_S
            ),
            step_time=LinearStepTime(
                prefill_ms_per_token2=0.0,
                prefill_ms_per_token=0.0,
                prefill_base_ms=0.0,
                decode_base_ms=step_ms,
                decode_ms_per_seq=0.0,
                decode_ms_per_kv_token=0.0,
            ),
            token_ids=_TOKEN_IDS,
            time_scale=1.0 if step_ms else 0.0,
        )
    )
    info = engine.info
    gate, leases = Gate(_MAX_REQUESTS), LeaseKeeper(clock)
    metrics = WorkerMetrics(CollectorRegistry(), model=MODEL, shape="mock", worker_id=incarnation)
    codec = KvHandleCodec(
        _KEY, KvIdentity(model=MODEL, revision="", block_size_tokens=block_size, kv_layout=info.kv_layout)
    )
    server = grpc.aio.server()
    address = f"{LOOPBACK}:{server.add_insecure_port(f'{LOOPBACK}:0')}"
    peer = KvPeerAddress(incarnation, LOOPBACK, 0, 1)
    worker_pb2_grpc.add_PrefillLegServicer_to_server(
        PrefillLeg(
            engine, codec, gate, PrefillLegConfig(address=address, lease_s=_LEASE_S, peer=peer), metrics
        ),
        server,
    )
    leg = StreamLeg(engine, codec, gate, leases, clock, metrics, lease_s=_LEASE_S)
    worker_pb2_grpc.add_DecodeLegServicer_to_server(leg, server)
    server.add_generic_rpc_handlers((leg.handlers(),))
    await server.start()
    print(address, flush=True)
    await server.wait_for_termination()


def main() -> None:
    """Prints its address once it serves."""
    import uvloop

    parser = argparse.ArgumentParser()
    parser.add_argument("incarnation")
    parser.add_argument("--step-ms", type=float, required=True)
    arguments = parser.parse_args()
    uvloop.run(_serve(arguments.incarnation, arguments.step_ms))


if __name__ == "__main__":
    main()
