"""What comes of the planner's decisions."""

from __future__ import annotations

from enum import StrEnum


class Mode(StrEnum):
    """Whether there are decisions, and whether they are carried out."""

    OFF = "off"
    """There are none."""
    ADVISE = "advise"
    """They are shown."""
    AUTO = "auto"
    """They are carried out."""
