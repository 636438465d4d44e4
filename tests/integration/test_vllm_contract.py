"""What Baton uses of vLLM beyond its public interface: an upgrade that changes it fails here first."""

from __future__ import annotations

import inspect

import pytest


def parameters(callable_) -> list[str]:
    return list(inspect.signature(callable_).parameters)


def test_the_connector_overrides_methods_that_exist() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

    from kv_transfer import connector

    for ours, base in (
        (connector.BatonConnectorScheduler, NixlPullConnectorScheduler),
        (connector.BatonConnectorWorker, NixlPullConnectorWorker),
    ):
        for name, method in vars(ours).items():
            theirs = getattr(base, name, None)
            if name.startswith("__") or not inspect.isfunction(method) or theirs is None:
                continue
            assert parameters(method) == parameters(theirs), name


@pytest.mark.parametrize(
    "name",
    [
        *("_recving_metadata", "_recving_transfers", "_recv_failures", "_reqs_to_send", "_reqs_to_process"),
        *("consumer_notification_counts_by_req", "expected_consumer_notifications_by_req", "xfer_stats"),
        *("nixl_wrapper", "nixl_backends", "device_type", "_handle_failed_transfer", "_ensure_handshake"),
        *("_reap_expired_send_leases", "_pop_done_transfers", "_read_blocks_for_req", "get_transfer_results"),
        *("_engines_with_inflight_transfers", "_try_release_xfer_handle"),
    ],
)
def test_the_nixl_worker_still_has_what_the_connector_touches(name: str) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker, pull_worker

    assert f"{name}" in inspect.getsource(base_worker) + inspect.getsource(pull_worker)


def test_the_nixl_scheduler_still_stamps_leases_with_the_monotonic_clock() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler

    source = inspect.getsource(NixlPullConnectorScheduler.request_finished)
    assert "self._reqs_need_send[request.request_id] = (" in source
    assert "time.perf_counter() + request_kv_blocks_ttl" in source


def test_a_pulls_deadline_still_reaches_the_worker() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata

    from kv_transfer.params import DEADLINE_KEY

    params = {
        "remote_block_ids": [[1]],
        "remote_engine_id": "e",
        "remote_request_id": "r",
        "remote_host": "h",
        "remote_port": 1,
        DEADLINE_KEY: 12.5,
    }
    metadata = NixlConnectorMetadata()
    metadata.add_new_req_to_recv("r", [[1]], params)
    assert metadata.reqs_to_recv["r"].remote.blocks_expiry_time == 12.5


def test_the_scheduler_still_shows_the_connector_each_step_and_then_its_result() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    assert inspect.getsource(Scheduler.schedule).count("self._build_kv_connector_meta(") == 1
    assert inspect.getsource(Scheduler._build_kv_connector_meta).count("build_connector_meta(") == 1
    assert (
        inspect.getsource(Scheduler.update_from_output).count("self.connector.get_kv_connector_stats()") == 1
    )


def test_the_connector_still_gets_the_block_pool_and_its_reports_before_blocks_are_freed() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler

    assert parameters(KVConnectorBase_V1.bind_kv_cache_manager)[1:] == ["kv_cache_manager"]
    assert "bind_kv_cache_manager(" in inspect.getsource(Scheduler.__init__)
    assert parameters(KVCacheManager.get_blocks)[1:] == ["request_id"]
    assert parameters(BlockPool.touch)[1:] == ["blocks"]
    assert parameters(BlockPool.free_blocks)[1:] == ["ordered_blocks"]
    finished = inspect.getsource(Scheduler._update_from_kv_xfer_finished)
    assert 0 < finished.index("update_connector_output(") < finished.index("_free_blocks(")


def test_a_failed_pulls_request_still_gets_other_blocks() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    assert "request.num_computed_tokens = 0" in inspect.getsource(Scheduler._handle_failed_recving)
    assert "self.kv_cache_manager.free(request)" in inspect.getsource(Scheduler._update_waiting_for_remote_kv)


def test_the_engine_still_steps_while_the_connector_has_something_to_look_after() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    assert "self.connector.has_pending_push_work()" in inspect.getsource(Scheduler.has_requests)


def test_request_ids_still_end_in_eight_random_digits() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.utils import get_base_request_id
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor

    request = EngineCoreRequest("abc.7.p0", [1], None, None, None, 0.0, None, None, None)
    InputProcessor.assign_request_id(request)
    assert request.request_id != "abc.7.p0"
    assert get_base_request_id(request.request_id) == "abc.7.p0"


def test_the_front_end_classes_have_the_methods_the_router_calls() -> None:
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
    from vllm.v1.engine.parallel_sampling import ParentRequest

    assert parameters(OutputProcessor.add_request)[1:] == [
        *("request", "prompt", "parent_req", "request_index", "queue")
    ]
    assert parameters(OutputProcessor.abort_requests)[1:] == ["request_ids", "internal"]
    assert parameters(OutputProcessor.process_outputs)[1] == "engine_core_outputs"
    assert {"get", "get_nowait", "put", "close"} <= set(dir(RequestOutputCollector))
    assert parameters(ParentRequest.get_child_info)[1:] == ["index"]
    assert parameters(InputProcessor.process_inputs)[1:4] == ["request_id", "prompt", "params"]


def test_the_engine_client_implements_all_of_vllms_interface() -> None:
    from vllm.engine.protocol import EngineClient

    from router.engine_client import RelayEngineClient

    assert not RelayEngineClient.__abstractmethods__
    assert issubclass(RelayEngineClient, EngineClient)
    theirs = set(parameters(EngineClient.generate))
    assert theirs == set(parameters(RelayEngineClient.generate))
