"""The figures of a simulation run, against values computed by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path as FilePath

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigError
from core.request import Path
from simulator.reports.summary import distribution_ms, summarize, to_json, weighted_percentiles, worst_minute
from simulator.result import Gaps, Outcome, RequestTable, SimulationResult, Slo, Timeline

SLO = Slo(ttft_s=1.0, tpot_s=0.1)
NAN = math.nan

Row = tuple[float, float, float, float, int, int, int, Outcome, Path]
"""arrival_s, ttft_s, tpot_s, e2e_s, prompt, output and cached tokens, outcome, path."""

ROWS: list[Row] = [
    (0.0, 0.5, 0.05, 0.55, 100, 2, 50, Outcome.DONE, Path.REMOTE),  # meets both
    (1.0, 1.0, 0.10, 2.00, 100, 11, 0, Outcome.DONE, Path.REMOTE),  # meets both, exactly
    (2.0, 2.0, 0.05, 2.05, 200, 2, 0, Outcome.DONE, Path.LOCAL),  # TTFT too long
    (3.0, 0.5, 0.20, 0.70, 100, 2, 50, Outcome.DONE, Path.REMOTE),  # TPOT too long
    (4.0, 0.1, NAN, 0.10, 100, 1, 25, Outcome.DONE, Path.PREFILL_ONLY),  # one token: no TPOT to miss
    (5.0, NAN, NAN, NAN, 999, 0, 0, Outcome.REJECTED, Path.NONE),
    (6.0, 0.1, 0.01, NAN, 400, 5, 0, Outcome.FAILED, Path.REMOTE),  # fast, then lost
    (7.0, NAN, NAN, NAN, 999, 0, 0, Outcome.FAILED, Path.REMOTE),
]


def run_of(rows: list[Row]) -> SimulationResult:
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in range(9)]
    arrival_s, ttft_s, tpot_s, e2e_s = (np.array(column, dtype=np.float64) for column in columns[:4])
    prompt, output, cached = (np.array(column, dtype=np.int64) for column in columns[4:7])
    outcome, path = (np.array(column, dtype=np.str_) for column in columns[7:])
    no_counts, no_times = np.zeros(0, dtype=np.int64), np.zeros(0)
    return SimulationResult(
        trace_name="by hand",
        requests=RequestTable(
            arrival_s=arrival_s,
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            e2e_s=e2e_s,
            prompt_tokens=prompt,
            output_tokens=output,
            cached_tokens=cached,
            outcome=outcome,
            path=path,
            prefill_queue_s=np.zeros(len(rows)),
            transfer_s=np.full(len(rows), NAN),
        ),
        gaps=Gaps(gap_s=np.array([0.2, 0.01, 0.05]), weight=np.array([1, 90, 9])),
        timeline=Timeline(
            time_s=no_times,
            num_prefill_workers=no_counts,
            num_decode_workers=no_counts,
            num_starting_workers=no_counts,
            waiting_prefill_tokens=no_counts,
            num_waiting=no_counts,
            num_running=no_counts,
            kv_use=no_times,
        ),
        events=(),
        num_role_switches=4,
        gpu_seconds=7200.0,
        simulated_s=10.0,
        wall_s=1.0,
        extrapolated_share=0.25,
        num_preemptions=5,
        num_recomputed=6,
    )


def test_attainment_counts_all_offered_requests() -> None:
    summary = summarize(run_of(ROWS), SLO, settings={})
    assert (summary["num_requests"], summary["num_done"]) == (8, 5)
    assert (summary["num_rejected"], summary["num_failed"]) == (1, 2)
    assert summary["attainment"] == 3 / 8
    assert summary["attainment_ttft"] == 4 / 8
    assert summary["attainment_tpot"] == 4 / 8


def test_rates_are_per_simulated_second_and_per_gpu_hour() -> None:
    summary = summarize(run_of(ROWS), SLO, settings={})
    assert summary["goodput_rps"] == 0.3
    assert summary["throughput_rps"] == 0.5
    assert summary["output_tokens_per_s"] == 2.3
    assert summary["gpu_hours"] == 2.0
    assert summary["goodput_per_gpu_hour"] == 1.5


def test_latencies_are_those_of_requests_answered_in_full() -> None:
    ttft_ms = summarize(run_of(ROWS), SLO, settings={})["ttft_ms"]
    assert ttft_ms == pytest.approx(
        {"mean": 820.0, "p50": 500.0, "p90": 2000.0, "p95": 2000.0, "p99": 2000.0, "max": 2000.0}
    )
    tpot_ms = summarize(run_of(ROWS), SLO, settings={})["tpot_ms"]
    assert tpot_ms == pytest.approx(
        {"mean": 100.0, "p50": 50.0, "p90": 200.0, "p95": 200.0, "p99": 200.0, "max": 200.0}
    )


def test_gaps_are_weighted() -> None:
    itl_ms = summarize(run_of(ROWS), SLO, settings={})["itl_ms"]
    assert itl_ms == pytest.approx(
        {"mean": 15.5, "p50": 10.0, "p90": 10.0, "p95": 50.0, "p99": 50.0, "max": 200.0}
    )


def test_the_cached_share_is_of_prompts_that_were_prefilled() -> None:
    assert summarize(run_of(ROWS), SLO, settings={})["cached_share"] == 125 / 1000


def test_counts_are_passed_on() -> None:
    summary = summarize(run_of(ROWS), SLO, settings={})
    assert summary["paths"] == {"local": 1, "none": 1, "prefill_only": 1, "remote": 5}
    assert (summary["role_switches"], summary["preemptions"], summary["recomputed"]) == (4, 5, 6)
    assert summary["extrapolated_share"] == 0.25
    assert summary["slo"] == {"ttft_ms": 1000.0, "tpot_ms": 100.0}


def test_a_run_of_no_requests_has_figures_of_none() -> None:
    result = replace(run_of([]), gpu_seconds=0.0, simulated_s=0.0, extrapolated_share=NAN)
    summary = json.loads(to_json(summarize(result, SLO, settings={})))
    for key in ("attainment", "goodput_rps", "goodput_per_gpu_hour", "cached_share", "extrapolated_share"):
        assert summary[key] is None
    assert summary["ttft_ms"] == dict.fromkeys(["mean", "p50", "p90", "p95", "p99", "max"])
    assert summary["worst_minute"] is None
    assert summary["num_requests"] == 0


@pytest.mark.parametrize("slo", [Slo(ttft_s=0.0, tpot_s=0.1), Slo(ttft_s=1.0, tpot_s=NAN)])
def test_an_slo_that_is_not_positive_is_refused(slo: Slo) -> None:
    with pytest.raises(ConfigError, match=r"slo\.t.*positive number of seconds"):
        summarize(run_of(ROWS), slo, settings={})


# -------------------------------------------------------------------------------------- worst minute


def minutes(*num_met_of: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Arrivals and whether they met the SLO: (met, offered) of each minute."""
    arrival_s = [60.0 * i + 59.0 * k / n for i, (_, n) in enumerate(num_met_of) for k in range(n)]
    met = [k < good for good, n in num_met_of for k in range(n)]
    return np.array(arrival_s), np.array(met, dtype=np.bool_)


def test_the_worst_minute_is_the_earliest_with_least_attainment() -> None:
    worst = worst_minute(*minutes((20, 20), (5, 10), (10, 20), (15, 20), (20, 20)))
    assert worst == {"start_s": 60.0, "attainment": 0.5, "num_requests": 10}


def test_a_minute_of_few_requests_is_not_the_worst() -> None:
    worst = worst_minute(*minutes((18, 20), (0, 9), (20, 20), (20, 20)))
    assert worst is not None
    assert worst["start_s"] == 0.0


def test_a_minute_cut_short_by_the_end_is_not_the_worst() -> None:
    worst = worst_minute(*minutes((18, 20), (20, 20), (0, 20)))
    assert worst is not None
    assert worst["start_s"] == 0.0


def test_a_run_of_less_than_a_minute_has_no_worst_minute() -> None:
    assert worst_minute(*minutes((0, 20))) is None


# ---------------------------------------------------------------------------------------------- JSON


def test_json_is_the_same_whatever_the_wall_time() -> None:
    result = run_of(ROWS)
    texts = {
        to_json(summarize(replace(result, wall_s=wall_s), SLO, settings={"seed": 1})) for wall_s in (1, 2)
    }
    assert len(texts) == 1
    assert "wall" not in texts.pop()


def test_json_rounds_figures_and_leaves_settings_alone() -> None:
    result = replace(run_of(ROWS), simulated_s=3.0)
    settings = {"rate_scale": 1.23456789012, "seed": np.int64(7), "trace": FilePath("a.csv"), "split": (4, 4)}
    loaded = json.loads(to_json(summarize(result, SLO, settings=settings)))
    assert loaded["throughput_rps"] == 1.66667
    assert loaded["settings"] == {"rate_scale": 1.23456789012, "seed": 7, "trace": "a.csv", "split": [4, 4]}


def test_json_ends_with_a_newline_and_keeps_its_order() -> None:
    summary = summarize(run_of(ROWS), SLO, settings={})
    text = to_json(summary)
    assert text.endswith("}\n")
    assert list(json.loads(text)) == list(summary)


def test_a_setting_that_is_no_json_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"settings\.policy is a object"):
        summarize(run_of(ROWS), SLO, settings={"policy": object()})


# ---------------------------------------------------------------------------------------------- laws

times_s = st.floats(0.0, 10.0)
rows = st.tuples(
    times_s,
    times_s | st.just(NAN),
    st.floats(0.0, 0.5) | st.just(NAN),
    times_s,
    st.integers(1, 1000),
    st.integers(0, 100),
    st.just(0),
    st.sampled_from(Outcome),
    st.sampled_from(Path),
)


@given(st.lists(rows, min_size=1, max_size=30).map(lambda drawn: sorted(drawn, key=lambda row: row[0])))
def test_attainment_is_at_most_each_of_its_parts_and_at_most_the_share_answered(drawn: list[Row]) -> None:
    summary = summarize(run_of(drawn), SLO, settings={})
    parts = (summary["attainment_ttft"], summary["attainment_tpot"])
    answered = summary["num_done"] / summary["num_requests"]
    assert summary["attainment"] >= sum(parts) - answered - 1e-9
    assert summary["attainment"] <= min(parts)
    assert max(parts) <= answered
    assert sum(summary["paths"].values()) == summary["num_requests"]
    json.loads(to_json(summary))


weighted = st.lists(st.tuples(st.floats(0.0, 100.0), st.integers(1, 20)), min_size=1, max_size=40)


@given(weighted)
def test_percentiles_rise_and_lie_within_the_values(pairs: list[tuple[float, int]]) -> None:
    seconds, weight = (np.array(column) for column in zip(*pairs, strict=True))
    figures = distribution_ms(seconds, weight)
    ordered = [figures[name] for name in ("p50", "p90", "p95", "p99", "max")]
    assert ordered == sorted(ordered, key=lambda value: value or 0.0)
    assert figures["max"] == max(seconds) * 1e3
    assert figures["mean"] == pytest.approx(np.repeat(seconds, weight).mean() * 1e3)


@given(weighted, st.integers(1, 100))
def test_a_weighted_percentile_is_that_of_the_values_written_out(
    pairs: list[tuple[float, int]], percent: int
) -> None:
    seconds, weight = (np.array(column) for column in zip(*pairs, strict=True))
    written_out = np.sort(np.repeat(seconds, weight))
    rank = math.ceil(percent * len(written_out) / 100)
    assert weighted_percentiles(seconds, weight, [percent]) == [written_out[rank - 1]]
