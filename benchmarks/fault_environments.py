"""Virtual environments of the peers, made once under the user's cache.

One of its own for each: what a peer needs may be at odds with what Baton needs. Ray Serve LLM is part of the
Ray that Baton runs on, so its environment sees Baton's packages and adds the few that Baton does without.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from benchmarks.model import CACHE

_ROOT = CACHE.with_name("baton-benchmarks")
_CONSTRAINTS = Path(__file__).parent.parent / "constraints-cpu.txt"


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment.

    Args:
        packages: as pip takes them.
        sees_ours: also imports what this interpreter imports; then ``packages`` come without dependencies.
    """

    name: str
    packages: tuple[str, ...]
    sees_ours: bool = False

    def make(self) -> Path:
        """Its directory; makes it if it is not there, which takes seconds and the network."""
        directory = _ROOT / self.name
        stamp = directory / ".made-of"
        content = f"{sys.executable}\n" + "\n".join(self.packages)
        if stamp.exists() and stamp.read_text() == content:
            return directory
        shutil.rmtree(directory, ignore_errors=True)
        _uv("venv", "--python", sys.executable, str(directory))
        options = ["--python", str(directory / "bin" / "python"), "--constraint", str(_CONSTRAINTS)]
        if self.sees_ours:
            options.append("--no-deps")
            ours = sysconfig.get_path("purelib")
            (site,) = directory.glob("lib/python*/site-packages")
            # A path alone would leave out what is installed there in editable form.
            (site / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
        _uv("pip", "install", *options, *self.packages)
        stamp.write_text(content)
        return directory


VLLM_ROUTER = Environment("vllm-router", ("vllm-router==0.1.17", "pyyaml"))
RAY_SERVE_LLM = Environment(
    "ray-serve-llm",
    ("pyarrow>=17", "jsonref>=1.1", "hf_transfer", "meson", "pybind11", "async-timeout"),
    sees_ours=True,
)


def _uv(*arguments: str) -> None:
    find_links = os.environ.get("UV_FIND_LINKS") or ",".join(os.environ.get("PIP_FIND_LINKS", "").split())
    environment = os.environ | ({"UV_FIND_LINKS": find_links} if find_links else {})
    result = subprocess.run(
        [sys.executable, "-m", "uv", "--quiet", *arguments],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    if result.returncode:
        raise RuntimeError(f"uv {arguments[0]} failed: {result.stderr.strip()}")
