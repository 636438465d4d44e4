"""The picture of a soak: answers, time to first token, and memory over time, with the faults as marks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_BIN_S = 10.0
_COLOURS = {"worker": "tab:red", "engine": "tab:orange", "router": "tab:purple", "": "tab:gray"}


def plot_soak(soak: Mapping[str, Any], path: Path) -> None:
    """Draws ``soak.json`` into an image."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    answers = np.array(soak["answers"] or [(0.0, 0.0)])
    length_s = max(soak["minutes"] * 60, float(answers[:, 0].max()))
    edges = np.arange(0, length_s + _BIN_S, _BIN_S)
    figure, (rate, ttft, memory) = plt.subplots(3, 1, figsize=(11, 8), sharex=True, layout="constrained")

    counts, _ = np.histogram(answers[:, 0], edges)
    rate.step(edges[:-1] / 60, counts / _BIN_S, where="post", color="tab:blue")
    rate.set_ylabel("right answers per second")
    rate.set_ylim(0, 1.3 * float(counts.max()) / _BIN_S)  # room for the legend

    which = np.maximum(np.digitize(answers[:, 0], edges) - 1, 0)  # some came while it was being set up
    for percent, style in ((50, "-"), (95, ":")):
        values = [np.percentile(answers[which == number, 1], percent) for number in np.unique(which)]
        ttft.plot(edges[np.unique(which)] / 60, values, style, color="tab:green", label=f"p{percent}")
    ttft.set_ylabel("time to first token, s")
    ttft.set_yscale("log")
    ttft.legend(loc="upper right")

    for name, series in sorted(soak["memory"].items()):
        times, sizes = np.array(series).T
        memory.plot(times / 60, sizes, label=name)
    memory.set_ylabel("resident memory, MiB")
    memory.set_yscale("log")
    memory.set_xlabel("minutes")
    memory.set_ylim(top=3 * memory.get_ylim()[1])
    memory.legend(loc="upper right", ncols=4, fontsize="small")

    for axis in (rate, ttft, memory):
        for at_s, name in soak["events"]:
            colour = next(colour for kind, colour in _COLOURS.items() if name.endswith(kind))
            axis.axvline(at_s / 60, color=colour, linewidth=0.8, alpha=0.6)
    handles = [plt.Line2D([], [], color=colour, label=kind or "other") for kind, colour in _COLOURS.items()]
    rate.legend(handles=handles, title="faults", loc="upper right", ncols=4, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
