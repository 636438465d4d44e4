"""A picture of a profile: measured points, what the simulator makes of them, and the linear fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from core.errors import ConfigError
from core.performance_model import PrefillChunk, StepTime
from core.performance_profile import PerformanceProfile
from core.profile_fit import fit_linear
from core.table_step_time import TableStepTime

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
_CURVE_POINTS = 120
_COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#edae49", "#6a4c93", "#00798c", "#8d6a4f")
_TABLE, _FIT = "-", ":"
"""Line styles."""


def check_plot_path(path: Path) -> None:
    """
    Raises:
        ConfigError: no picture can be written there.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot {path}: the name must end in one of {', '.join(FORMATS)}")


def plot_profile(profile: PerformanceProfile, path: Path) -> None:
    """Writes the picture; its format follows from the name's end.

    Raises:
        ConfigError: no picture can be written there.
    """
    from matplotlib.figure import Figure

    check_plot_path(path)
    fit, table = fit_linear(profile), TableStepTime(profile)
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    prefill_axes, decode_axes = figure.subplots(1, 2)
    _plot_prefill(prefill_axes, profile, table, fit.step_time)
    _plot_decode(decode_axes, profile, table, fit.step_time)
    prefill_axes.set_title(f"Prefill: fit off by {_error(fit.prefill_errors)}", fontsize=10)
    decode_axes.set_title(f"Decode step: fit off by {_error(fit.decode_errors)}", fontsize=10)
    figure.suptitle(f"{profile.name}: {profile.model} on {profile.accelerator}", fontsize=11)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot be written: {error.strerror}") from error


def _error(errors: tuple[float, ...]) -> str:
    magnitudes = np.abs(errors)
    return f"{100 * np.median(magnitudes):.1f}% (median), {100 * magnitudes.max():.1f}% (worst)"


def _plot_prefill(axes: Axes, profile: PerformanceProfile, table: StepTime, fit: StepTime) -> None:
    lengths = [point.prompt_tokens for point in profile.prefill]
    curve = np.unique(np.geomspace(min(lengths), max(lengths), _CURVE_POINTS).astype(int))
    for step_time, style, label in ((table, _TABLE, "interpolated"), (fit, _FIT, "linear fit")):
        milliseconds = [1e3 * step_time.step_s((_whole(int(tokens)),), 0, 0) for tokens in curve]
        axes.plot(curve, milliseconds, color=_COLOURS[0], label=label, linestyle=style, linewidth=1.3)
    axes.plot(
        lengths, [1e3 * point.seconds for point in profile.prefill], "o", color=_COLOURS[0], label="measured"
    )
    axes.set(xlabel="prompt tokens", ylabel="ms to first token", xscale="log", yscale="log")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)


def _whole(num_tokens: int) -> PrefillChunk:
    return PrefillChunk(context_tokens=0, num_tokens=num_tokens, ends_prompt=True)


def _plot_decode(axes: Axes, profile: PerformanceProfile, table: StepTime, fit: StepTime) -> None:
    batches = sorted({point.num_decoding for point in profile.decode})
    shown = batches if len(batches) <= len(_COLOURS) else batches[:: -(-len(batches) // len(_COLOURS))]
    for colour, num_decoding in zip(_COLOURS, shown, strict=False):
        points = sorted(
            (point.kv_tokens, 1e3 * point.seconds)
            for point in profile.decode
            if point.num_decoding == num_decoding
        )
        curve = np.linspace(points[0][0], points[-1][0], _CURVE_POINTS if len(points) > 1 else 1)
        for step_time, style in ((table, _TABLE), (fit, _FIT)):
            milliseconds = [1e3 * step_time.step_s((), num_decoding, int(tokens)) for tokens in curve]
            axes.plot(curve, milliseconds, color=colour, linestyle=style, linewidth=1.3)
        axes.plot(*zip(*points, strict=True), "o", color=colour, label=f"batch {num_decoding}")
    axes.set(xlabel="KV tokens of the batch", ylabel="ms per step", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
