"""What a start is doing, one line per phase."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str], None]
"""Called with the name of each phase as it begins."""
