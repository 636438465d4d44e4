"""The soak for two minutes; ``make soak`` runs it for as long as one likes."""

from __future__ import annotations

import pytest

from tests.faults.cluster import FaultCluster
from tests.faults.record import FaultReport
from tests.faults.references import References
from tests.faults.soak import Soak

MINUTES = 2.0


@pytest.mark.engine
@pytest.mark.endurance
@pytest.mark.timeout(560)
@pytest.mark.fault_row(21)
async def test_two_minutes_of_kills_lose_no_request_and_leave_nothing_behind(
    broken_cluster: FaultCluster, references: References, fault_report: FaultReport
) -> None:
    result = await Soak(broken_cluster, references, minutes=MINUTES, seed=1).run()
    print(result.fates, result.faults, result.memory_mib)
    fault_report.record(
        row=21,
        what=f"a soak of {MINUTES:g} minutes: {len(result.events)} faults",
        served=result.fates.get("right", 0),
        failed=result.failed,
        refused=result.fates.get("refused", 0),
        wrong=result.fates.get("wrong", 0),
        leaked=result.leaked,
        orphans=result.orphans,
    )
    assert result.troubles == []
