"""One cluster for every fault, and the right answers to everything it is asked."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from deploy.tiny_model import make_tiny_model
from tests.faults.cluster import FaultCluster, fault_cluster
from tests.faults.configuration import configuration
from tests.faults.load import Fate, Load
from tests.faults.references import References, make_references

NUM_WARM_UP = 40
_CLUSTER = "broken_cluster"
_running = pytest.StashKey[tuple[FaultCluster, contextlib.ExitStack]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts tests of the broken cluster together, before those of the cluster that all others share."""

    def place(item: pytest.Item) -> int:
        names = getattr(item, "fixturenames", ())
        if "servers" in names:
            return 3
        if _CLUSTER not in names:
            return 0
        return 2 if item.get_closest_marker("leaves_other_weights") else 1

    items.sort(key=place)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ends the cluster with the last test that needs it: two have no room on one machine."""
    if nextitem is None or _CLUSTER not in getattr(nextitem, "fixturenames", ()):
        _end_cluster(item.config)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """An interrupted run has no next test to end it before."""
    _end_cluster(session.config)


def _end_cluster(config: pytest.Config) -> None:
    found = config.stash.get(_running, None)
    if found is not None:
        del config.stash[_running]
        found[1].close()


@pytest.fixture(scope="session")
def fault_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("fault-model") / "tiny")


@pytest.fixture(scope="session")
def references(fault_model: Path, tmp_path_factory: pytest.TempPathFactory) -> References:
    """From plain vLLM, which has ended before the cluster starts."""
    return make_references(fault_model, tmp_path_factory.mktemp("references"))


async def _warm_up(cluster: FaultCluster, references: References) -> None:
    """Until routers know how long steps take; while nothing is broken every answer has to be right."""
    async with Load(cluster.url, references, clients=8, seed="warm-up") as load:
        await load.wait_until("some answers", lambda: len(load.outcomes) >= NUM_WARM_UP, within_s=120)
    assert [str(each) for each in load.outcomes if each.fate is not Fate.RIGHT] == []


@pytest.fixture
def broken_cluster(
    request: pytest.FixtureRequest,
    fault_model: Path,
    references: References,
    tmp_path_factory: pytest.TempPathFactory,
) -> FaultCluster:
    """Started by the first test that asks; it has recovered from the fault before."""
    stash = request.config.stash
    if _running not in stash:
        stack = contextlib.ExitStack()
        context = fault_cluster(configuration(fault_model), tmp_path_factory.mktemp("faults"))
        stash[_running] = stack.enter_context(context), stack
        asyncio.run(_warm_up(stash[_running][0], references))
    cluster, _ = stash[_running]
    cluster.wait_whole()
    return cluster
