"""The KV link as latency and bandwidth, from measured pulls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from core.performance_model import KvLink
from core.performance_profile import TransferPoint
from core.profile_fit import non_negative_least_squares

DEFAULT_LINK = KvLink(latency_s=0.002, bytes_per_s=25e9)
"""Where no pull was measured: RDMA at 200 Gbit/s, and a handshake-free pull's fixed cost."""

_HIDDEN_SHARE = 0.05
"""Share of the longest pull that bandwidth may take without being seen in noisy points."""


def fit_link(points: Sequence[TransferPoint]) -> KvLink:
    """Least relative error over the points; the default link if there is none.

    With a single size all the time counts as bandwidth. Where bigger pulls were not slower, the bandwidth is
    the least that could hide in the points.
    """
    if not points:
        return DEFAULT_LINK
    num_bytes = np.array([point.num_bytes for point in points], dtype=np.float64)
    seconds = np.array([point.seconds for point in points], dtype=np.float64)
    # Rows divided by the measured time, so that short pulls count like long ones.
    columns = np.stack([1 / seconds, num_bytes / seconds], axis=1)
    if len(set(num_bytes.tolist())) == 1:
        columns[:, 0] = 0.0
    latency_s, s_per_byte = non_negative_least_squares(columns, np.ones_like(seconds)).tolist()
    s_per_byte = s_per_byte or _HIDDEN_SHARE * latency_s / float(num_bytes.max())
    return KvLink(latency_s=latency_s, bytes_per_s=1 / s_per_byte)
