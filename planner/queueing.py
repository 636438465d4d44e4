"""Queueing formulas: how many requests of a queue are served in time.

A queue whose customers are turned away, or are of no use, once they have waited longer than ``slack``:
the M/M/c queue with constant patience (Baccelli & Hebuterne 1981, Boots & Tijms 1999) loses

    (1 - rho) alpha / (1 - rho alpha),   alpha = P(wait) exp(-2 c (1 - rho) slack / (service (ca2 + cs2)))

where alpha is, for rho < 1, the share that would wait longer than that if nobody left. The formula goes
on through rho = 1, where alpha passes 1, and tends to the excess, 1 - 1/rho. The squared coefficients of
variation of arrivals (ca2) and service (cs2) scale the exponent as in Kingman's approximation; P(wait) is
Sakasegawa's, rho ** (sqrt(2 (c + 1)) - 1), which is exact for one server, also beyond rho = 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_MAX_EXPONENT = 50.0


def lost_share(
    utilisation: Floats, num_servers: Floats, slack_services: Floats, variation: Floats | float
) -> Floats:
    """Share of requests that are not served in time; arguments broadcast.

    Args:
        utilisation: work that comes over work that can be done; may pass 1.
        num_servers: above 0, fractions allowed.
        slack_services: how long a request may wait, as a multiple of the mean service time; below 0
            everything is lost.
        variation: ca2 + cs2, 2 for Poisson arrivals and exponential service times.
    """
    rho = np.where(np.abs(utilisation - 1.0) < 1e-6, 1.0 + 1e-6, utilisation)
    rho = np.maximum(rho, 1e-9)
    log_waits = (np.sqrt(2.0 * (num_servers + 1.0)) - 1.0) * np.log(rho)
    exponent = -2.0 * num_servers * (1.0 - rho) * np.maximum(slack_services, 0.0) / variation
    alpha = np.exp(np.minimum(log_waits + exponent, _MAX_EXPONENT))
    lost = (1.0 - rho) * alpha / (1.0 - rho * alpha)
    return np.where(slack_services < 0.0, 1.0, np.clip(lost, 0.0, 1.0))
