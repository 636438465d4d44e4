"""The baton command and Ray's own, as a user runs them: in processes whose offspring can be told apart."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

_MARK = "BATON_COMMAND_TEST"
BIN = Path(sys.executable).parent


class Commands:
    """Runs commands in one environment and knows every process they started.

    Args:
        home: folder for their state, cache and configuration files.
    """

    def __init__(self, home: Path, environment: Mapping[str, str] | None = None) -> None:
        self.home = home
        self._mark = uuid.uuid4().hex
        self.environment = {
            **os.environ,
            "XDG_STATE_HOME": str(home / "state"),
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "200",
            **(environment or {}),
            _MARK: self._mark,
        }

    def run(self, *arguments: object, timeout_s: float = 100.0) -> subprocess.CompletedProcess[str]:
        """Runs ``baton ARGUMENTS`` to its end."""
        return self.run_any(BIN / "baton", *arguments, timeout_s=timeout_s)

    def run_any(self, *command: object, timeout_s: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(part) for part in command],
            cwd=self.home,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def write_config(self, config: Mapping[str, Any]) -> Path:
        path = self.home / f"{uuid.uuid4().hex[:8]}.yaml"
        path.write_text(json.dumps(config))
        return path

    def left_running(self, grace_s: float = 15.0) -> list[str]:
        """What the commands started and did not end."""
        deadline_s = time.monotonic() + grace_s
        while (left := self.processes()) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        return [" ".join(process.cmdline())[:150] for process in left]

    def end_all(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def processes(self) -> list[psutil.Process]:
        """Those that live and were started by the commands."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found


def mock_config(model_path: Path, port: int, **changes: Any) -> dict[str, Any]:
    """One prefill and one decode worker that keep time instead of computing."""
    return {
        "models": [
            {
                "name": "mocked",
                "path": str(model_path),
                "slo": {"ttft_ms": 1000, "tpot_ms": 100},
                "shapes": [
                    {
                        "name": "mock",
                        "count": 2,
                        "initial": {"prefill": 1, "decode": 1},
                        "gpus_per_worker": 0,
                        "cpus_per_worker": 0.1,
                        "engine": "mock",
                        "mock": {"decode_step_ms": 50},
                    }
                ],
            }
        ],
        "router": {"port": port},
        # A mock prefill worker never hears that its KV was pulled: it keeps it as long as the lease.
        "kv_transfer": {"lease_s": 5},
        "startup_timeout_s": 90,
        "drain_timeout_s": 20,
        **changes,
    }
