"""A rolling update to other weights, under load: an answer comes wholly from the old ones or from the new."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from deploy.tiny_model import make_tiny_model
from tests.faults.cluster import FaultCluster, in_thread
from tests.faults.load import Fate, Load
from tests.faults.record import FaultReport
from tests.faults.references import ANY, References, make_references
from tests.faults.row import IDLE_WITHIN_S, silences

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.fault_row(20),
    pytest.mark.leaves_other_weights,
]
ROLLED_WITHIN_S = 600.0
"""Every worker and router is replaced, a few at a time, beside the load: minutes on a small machine."""


async def test_a_rolling_update_loses_no_request_and_mixes_no_weights(
    fault_model: Path,
    broken_cluster: FaultCluster,
    references: References,
    fault_report: FaultReport,
    tmp_path: Path,
) -> None:
    other_path = await in_thread(make_tiny_model, tmp_path / "other", seed=1)
    other = await in_thread(make_references, other_path, tmp_path)
    old_workers = {worker["worker_id"] for worker in await in_thread(broken_cluster.workers)}
    old_routers = set(await in_thread(broken_cluster.replicas, "Router"))
    (model,) = broken_cluster.config["models"]

    async with Load(broken_cluster.url, references, clients=3, kinds=ANY, accept=(other,)) as load:
        await load.wait_until("streams", lambda: len(load.streaming()) > 1)
        began_s = time.monotonic()
        await in_thread(broken_cluster.apply, lambda _: model.update(path=str(other_path)), ROLLED_WITHIN_S)
        while not await in_thread(_rolled, broken_cluster, old_workers, old_routers):
            assert time.monotonic() - began_s < ROLLED_WITHIN_S, "the old replicas are still there"
            await asyncio.sleep(0.5)
        rolled_s = time.monotonic() - began_s
    async with Load(broken_cluster.url, other, clients=5, kinds=ANY) as after:
        await after.wait_until("some answers", lambda: len(after.outcomes) >= 10)
    leaked = await in_thread(broken_cluster.leaked_blocks, IDLE_WITHIN_S)
    left = await in_thread(broken_cluster.orphans)

    fault_report.record(
        row=20,
        what="a rolling update to other weights",
        served=load.count(Fate.RIGHT, began_s),
        refused=load.count(Fate.REFUSED),
        failed=load.count(Fate.FAILED),
        wrong=load.count(Fate.WRONG) + after.count(Fate.WRONG),
        **silences(load.since(began_s), began_s),
        whole_s=round(rolled_s, 1),
        leaked=len(leaked),
        orphans=len(left),
    )
    assert [str(each) for each in load.outcomes if each.fate is not Fate.RIGHT] == []
    assert [str(each) for each in after.outcomes if each.fate is not Fate.RIGHT] == []
    assert leaked == {}
    assert left == []


def _rolled(cluster: FaultCluster, old_workers: set[str], old_routers: set[object]) -> bool:
    """Whether the cluster is whole without any of its old replicas."""
    if cluster.lacking():
        return False
    workers = {worker["worker_id"] for worker in cluster.workers()}
    return not workers & old_workers and not set(cluster.replicas("Router")) & old_routers
