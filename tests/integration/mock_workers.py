"""Workers on mock engines in this process, behind real gRPC, and a relay in front of them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import grpc
from prometheus_client import CollectorRegistry
from vllm.sampling_params import SamplingParams

from baton_proto import worker_pb2_grpc
from baton_proto.channel import SERVER_OPTIONS
from core.clock import MonotonicClock
from core.performance_model import LinearStepTime, StepTime
from core.request import Path
from core.step_times import StepTimes
from core.types import Role, Snapshot, WorkerReport
from core.worker_events import WorkerModelConfig
from decode_workers.lease_keeper import LeaseKeeper
from decode_workers.leg import DecodeLeg
from engine.base import EngineDelta, KvParams
from engine.gate import Gate
from engine.mock_engine import MockEngine, MockEngineConfig
from kv_transfer.handle import KvHandleCodec, KvIdentity
from kv_transfer.peer import KvPeerAddress
from prefill_workers.leg import PrefillLeg, PrefillLegConfig
from router.admission_limits import AdmissionLimits
from router.cluster_view import ClusterView
from router.lap_context import RelayConfig
from router.policies import make_policy
from router.relay import Relay
from router.relay_request import RelayRequest
from router.trace import RequestTrace
from router.traffic_counter import TrafficCounter
from router.worker_link import WorkerLink
from telemetry.worker_metrics import WorkerMetrics

MODEL = "mock"
STEP_TIME = LinearStepTime(
    prefill_ms_per_token2=0.0,
    prefill_ms_per_token=0.02,
    prefill_base_ms=2.0,
    decode_base_ms=2.0,
    decode_ms_per_seq=0.0,
    decode_ms_per_kv_token=0.0,
)
_ids = itertools.count()


class MockWorker:
    """One mock engine with both legs on a port of its own.

    Args:
        engine: settings of the engine that differ from the defaults here.
        max_requests: requests it holds before it refuses.
    """

    def __init__(
        self,
        role: Role,
        on_pulled,
        lease_s: float,
        *,
        engine: Mapping[str, Any] = MappingProxyType({}),
        max_requests: int = 1000,
    ) -> None:
        self.role = role
        self.revision = ""
        self._lease_s = lease_s
        self.worker_id = f"{role.value}-{next(_ids)}"
        settings = {
            "worker": WorkerModelConfig(num_kv_blocks=2000, block_size_tokens=16, lease_s=lease_s),
            "step_time": STEP_TIME,
        }
        self.engine = MockEngine(
            MockEngineConfig(
                incarnation=self.worker_id, model=MODEL, on_pulled=on_pulled, **(settings | dict(engine))
            )
        )
        self.gate = Gate(max_requests=max_requests)
        self.leases = LeaseKeeper(MonotonicClock())
        self.server = grpc.aio.server(options=SERVER_OPTIONS)

    async def start(self) -> None:
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        metrics = WorkerMetrics(CollectorRegistry(), model=MODEL, shape="s", worker_id=self.worker_id)
        codec = KvHandleCodec(
            b"k" * 32, KvIdentity(model=MODEL, revision=self.revision, block_size_tokens=16, kv_layout="mock")
        )
        peer = KvPeerAddress(self.worker_id, "127.0.0.1", 0, 1)
        self.prefill_leg = PrefillLeg(
            self.engine,
            codec,
            self.gate,
            PrefillLegConfig(address=self.address, lease_s=self._lease_s, peer=peer),
            metrics,
        )
        decode = DecodeLeg(
            self.engine, codec, self.gate, self.leases, MonotonicClock(), metrics, lease_s=self._lease_s
        )
        self.decode_leg = decode
        worker_pb2_grpc.add_PrefillLegServicer_to_server(self.prefill_leg, self.server)
        worker_pb2_grpc.add_DecodeLegServicer_to_server(decode, self.server)
        await self.server.start()

    @property
    def report(self) -> WorkerReport:
        info = self.engine.info
        return WorkerReport(
            worker_id=self.worker_id,
            incarnation=info.incarnation,
            model=MODEL,
            revision=self.revision,
            shape="s",
            allowed_roles=frozenset(Role),
            role=self.role,
            role_assigned=True,
            draining=self.gate.draining,
            address=self.address,
            node_id="n",
            metrics_address="",
            block_size_tokens=info.block_size_tokens,
            num_kv_blocks=info.num_kv_blocks,
            bytes_per_block=info.bytes_per_block,
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
            load=self.engine.load(),
        )

    async def kill(self) -> None:
        """As if the process were gone: the engine and every connection."""
        self.engine.kill()
        await self.server.stop(grace=0)

    async def stop(self) -> None:
        await self.server.stop(grace=0)
        await self.leases.close()
        await self.engine.shutdown(0.1)


@dataclass
class Answer:
    """What the relay emitted for one request."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    trace: RequestTrace | None = None


class MockCluster:
    """Prefill and decode workers and one relay; ``worker`` goes to every :class:`MockWorker`."""

    def __init__(
        self,
        num_prefill: int,
        num_decode: int,
        *,
        stall_timeout_s: float = 30.0,
        lease_s: float = 30.0,
        prefill_timeout_s: float = 30.0,
        resume_timeout_s: float = 5.0,
        max_retries: int = 3,
        replays: bool = True,
        policy: str = "least_load",
        step_time: StepTime | None = None,
        limits: AdmissionLimits | None = None,
        **worker: Any,
    ) -> None:
        roles = [Role.PREFILL] * num_prefill + [Role.DECODE] * num_decode
        self.workers = [MockWorker(role, self._on_pulled, lease_s, **worker) for role in roles]
        self._background: set[asyncio.Task[None]] = set()
        clock = MonotonicClock()
        self.clock = clock
        self.view = ClusterView(
            lambda report, on_load: WorkerLink(report.address, "router", on_load),
            clock,
            StepTimes(lambda shape: step_time),
        )
        config = RelayConfig(
            prefill_timeout_s=prefill_timeout_s,
            stall_timeout_s=stall_timeout_s,
            resume_timeout_s=resume_timeout_s,
            max_retries=max_retries,
            replays=replays,
        )
        self.traffic = TrafficCounter("router")
        self.relay = Relay(
            self.view,
            make_policy(policy, random_seed=0),
            config,
            clock,
            limits=limits,
            traffic=self.traffic,
        )

    def _on_pulled(self, params: KvParams) -> None:
        """A real puller tells the prefill engine over NIXL."""
        source = next(w for w in self.workers if w.engine.info.incarnation == params["remote_engine_id"])
        task = asyncio.ensure_future(source.engine.release_kv([params["remote_request_id"]]))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def of(self, role: Role) -> list[MockWorker]:
        return [worker for worker in self.workers if worker.role is role]

    async def __aenter__(self) -> MockCluster:
        for worker in self.workers:
            await worker.start()
        await self.publish()
        return self

    async def __aexit__(self, *_: object) -> None:
        for member in self.view.members():
            await member.close()
        for worker in self.workers:
            await worker.stop()

    async def publish(self, *, leave_out: tuple[MockWorker, ...] = ()) -> None:
        """Gives the router a new snapshot and waits until it is attached to everyone in it."""
        await self.heartbeat(leave_out=leave_out)
        for member in self.view.members():
            assert await member.link.wait_up(30.0)

    async def heartbeat(self, *, leave_out: tuple[MockWorker, ...] = ()) -> None:
        """Gives the router a new snapshot."""
        present = [worker for worker in self.workers if worker not in leave_out]
        epoch = self.view.snapshot.epoch + 1 if self.view.snapshot else 1
        snapshot = Snapshot(incarnation="r", epoch=epoch, workers=tuple(worker.report for worker in present))
        for member in self.view.update(snapshot):
            await member.close()

    async def ask(
        self,
        prompt: list[int],
        max_tokens: int = 8,
        path: Path = Path.REMOTE_EARLY,
        emit=None,
        **request: Any,
    ) -> Answer:
        """Relays one request and collects its answer; ``request`` goes to :class:`RelayRequest`."""
        answer = Answer()
        request_id = f"q{next(_ids)}"
        answer.trace = RequestTrace(
            request_id=request_id,
            model=MODEL,
            adapter="",
            tenant="",
            prompt_tokens=len(prompt),
            received_at_s=self.clock.now_s(),
            path=path,
        )

        def collect(delta: EngineDelta) -> None:
            answer.token_ids += delta.token_ids
            answer.finish_reason = delta.finish_reason
            if emit is not None:
                emit(delta)

        request = RelayRequest(
            request_id=request_id,
            model=MODEL,
            adapter="",
            tenant="",
            prompt_token_ids=prompt,
            params=SamplingParams(max_tokens=max_tokens, temperature=0.0),
            options=b"",
            path=path,
            **request,
        )
        await self.relay.run(request, answer.trace, collect)
        return answer

    async def wait_empty(self, timeout_s: float = 10.0) -> None:
        """Fails unless every living engine holds no KV and no request within the time."""
        async with asyncio.timeout(timeout_s):
            while any(  # noqa: ASYNC110  engines say nothing when they become idle
                _holds_something(worker) for worker in self.workers if not worker.engine.dead
            ):
                await asyncio.sleep(0.02)


def _holds_something(worker: MockWorker) -> bool:
    load = worker.engine.load()
    return bool(load.kv_used_blocks or load.num_running or load.num_waiting or worker.gate.num_inside)
