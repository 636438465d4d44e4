"""What fuzz tests share: one router in front of mock workers, and where their randomness came from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz.loop_thread import LoopThread
from tests.fuzz.profiles import SEED
from tests.integration.adapter import make_adapter
from tests.integration.conftest import make_reasoning_model


@pytest.fixture(scope="session")
def front_end(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    from tests.fuzz.front_end import FrontEnd

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", "CRITICAL")
        # A request for thousands of sequences is a right one, and takes as long as it takes.
        patch.setenv("VLLM_MAX_N_SEQUENCES", "8")
        model_path = make_reasoning_model(tmp_path_factory.mktemp("model") / "tiny")
        loop = LoopThread()
        front_end = FrontEnd(loop, model_path, make_adapter(model_path.parent / "adapter", model_path))
        yield front_end
        front_end.close()
        loop.close()
    assert not loop.unhandled


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    thorough = [
        report
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport)
        and "endurance" in report.keywords
        and "tests/fuzz" in report.nodeid
    ]
    if thorough:
        terminalreporter.write_line(f"fuzz seed: {SEED} (again: BATON_FUZZ_SEED={SEED})")
