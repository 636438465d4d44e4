"""The HTML report of a simulation run."""

from __future__ import annotations

import re
from base64 import b64decode
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from core.request import Path
from simulator.reports.report import number, percent, render_report
from simulator.reports.summary import summarize
from simulator.result import (
    ClusterEvent,
    Floats,
    Gaps,
    Outcome,
    RequestTable,
    SimulationResult,
    Slo,
    Timeline,
)

SLO = Slo(ttft_s=2.0, tpot_s=0.05)
SETTINGS = {
    "seed": 0,
    "policy": "baton",
    "profile": "H200 <8B>",
    "workers": "4 prefill + 4 decode",
    "rate_scale": 1.5,
}


def bursty_run(num_requests: int, duration_s: float = 3600.0) -> SimulationResult:
    """A run that looks real: two bursts, a queue that builds up and drains, role switches, a crash."""
    rng = np.random.default_rng(0)
    time_s = np.arange(0.0, duration_s + 1, duration_s / 3600)
    phase = time_s / duration_s
    rate = (
        1
        + 0.3 * np.sin(6 * phase)
        + 2.2 * ((phase > 0.3) & (phase < 0.38))
        + 1.2 * (abs(phase - 0.72) < 0.03)
    )
    arrival_s = np.sort(rng.choice(time_s, num_requests, p=rate / rate.sum()) + rng.random(num_requests))

    backlog = np.zeros(len(time_s))
    for i in range(1, len(time_s)):
        backlog[i] = max(0.0, backlog[i - 1] + (rate[i] + rng.normal(0, 0.3) - 2.2) * 7000)
    waited_s = np.interp(arrival_s, time_s, backlog) / 60000
    busy = np.interp(arrival_s, time_s, np.convolve(rate, np.ones(60) / 60, "same"))
    prompt = rng.lognormal(8.3, 1.0, num_requests).astype(np.int64) + 1
    output = rng.geometric(1 / 250, num_requests)
    ttft_s = 0.08 + prompt * 3e-5 + waited_s * rng.uniform(0.5, 1.2, num_requests)
    tpot_s = (0.012 + 0.009 * busy) * rng.lognormal(0, 0.25, num_requests)
    tpot_s[output == 1] = np.nan
    outcome = np.full(num_requests, Outcome.DONE.value, dtype="<U16")
    outcome[(waited_s > 9) & (rng.random(num_requests) < 0.3)] = Outcome.REJECTED
    outcome[abs(arrival_s - 0.55 * duration_s) < 2] = Outcome.FAILED
    lost = outcome != Outcome.DONE
    ttft_s[lost] = tpot_s[lost] = np.nan
    output[lost] = 0
    path = np.where(prompt < 1500, Path.LOCAL.value, Path.REMOTE_EARLY.value).astype("<U16")
    path[outcome == Outcome.REJECTED] = Path.NONE
    switched = (phase > 0.33) & (phase < 0.45)
    running = np.convolve(rate, np.ones(120) / 120, "same") * 60 + rng.normal(0, 2, len(time_s))
    return SimulationResult(
        trace_name="mooncake_conversation",
        requests=RequestTable(
            arrival_s=arrival_s,
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            e2e_s=ttft_s + np.nan_to_num(tpot_s) * (output - 1),
            prompt_tokens=prompt,
            output_tokens=output,
            cached_tokens=(prompt * rng.beta(1, 2, num_requests)).astype(np.int64),
            outcome=outcome,
            path=path,
            prefill_queue_s=waited_s,
            transfer_s=np.full(num_requests, np.nan),
        ),
        gaps=Gaps(gap_s=np.linspace(0.01, 0.2, 50), weight=np.arange(50, 0, -1)),
        timeline=Timeline(
            time_s=time_s,
            num_prefill_workers=np.where(switched, 5, 4),
            num_decode_workers=np.where(switched, 3, np.where((phase > 0.55) & (phase < 0.6), 3, 4)),
            num_starting_workers=np.where((phase > 0.55) & (phase < 0.6), 1, 0),
            waiting_prefill_tokens=backlog.astype(np.int64),
            num_waiting=(backlog / 7000).astype(np.int64),
            num_running=np.maximum(running, 0).astype(np.int64),
            kv_use=np.clip(running / 250 + 0.1, 0, 1),
        ),
        events=(
            ClusterEvent(time_s=0.33 * duration_s, kind="role_switch", worker_id="w5", detail="to prefill"),
            ClusterEvent(time_s=0.45 * duration_s, kind="role_switch", worker_id="w5", detail="to decode"),
            ClusterEvent(
                time_s=0.55 * duration_s, kind="worker_crash", worker_id="w7", detail="out of memory"
            ),
            ClusterEvent(time_s=0.60 * duration_s, kind="start", worker_id="w8"),
        ),
        num_role_switches=2,
        gpu_seconds=8 * (duration_s + 9.5),
        simulated_s=duration_s + 9.5,
        wall_s=rng.random(),
        extrapolated_share=0.08,
        num_preemptions=17,
        num_recomputed=3,
    )


def report_of(result: SimulationResult, slo: Slo = SLO) -> str:
    return render_report(result, summarize(result, slo, settings=SETTINGS), slo, title="Baton simulation")


def plots_of(report: str) -> list[str]:
    plots = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', report)
    return [b64decode(plot).decode() for plot in plots]


def first(result: SimulationResult, num_requests: int) -> SimulationResult:
    """The run with only its first requests."""
    columns = {name: getattr(result.requests, name) for name in RequestTable.__slots__}
    columns = {name: column[:num_requests] for name, column in columns.items() if column is not None}
    return replace(result, requests=RequestTable(**columns))


def unserved(result: SimulationResult) -> SimulationResult:
    """The run with every request rejected."""
    num_requests = len(result.requests.arrival_s)
    none: Floats = np.full(num_requests, np.nan)
    requests = replace(
        result.requests,
        ttft_s=none,
        tpot_s=none,
        e2e_s=none,
        output_tokens=np.zeros(num_requests, dtype=np.int64),
        outcome=np.full(num_requests, Outcome.REJECTED.value),
    )
    return replace(
        result, requests=requests, gaps=Gaps(gap_s=np.zeros(0), weight=np.zeros(0, dtype=np.int64))
    )


def no_samples() -> Timeline:
    counts = np.zeros(0, dtype=np.int64)
    return Timeline(
        time_s=np.zeros(0),
        num_prefill_workers=counts,
        num_decode_workers=counts,
        num_starting_workers=counts,
        waiting_prefill_tokens=counts,
        num_waiting=counts,
        num_running=counts,
        kv_use=np.zeros(0),
    )


@pytest.fixture(scope="module")
def report() -> str:
    return report_of(bursty_run(2000))


def test_the_report_is_one_file_that_asks_for_nothing_from_the_network(report: str) -> None:
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', report)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert "<script" not in report
    assert "@import" not in report
    assert "url(" not in report


def test_the_verdict_names_attainment_slo_goodput_and_gpus(report: str) -> None:
    summary = summarize(bursty_run(2000), SLO, settings=SETTINGS)
    verdict = re.sub(r"<[^>]+>|\s+", " ", report.split('class="verdict">')[1].split("</p>")[0])
    words = verdict.replace("&nbsp;", " ").replace("\u00a0", " ")
    for part in (percent(summary["attainment"]), "2,000 requests", "TTFT ≤ 2 s", "TPOT ≤ 50 ms", "8 GPUs"):
        assert part in words
    assert f"{number(summary['goodput_rps'])} requests/s" in words


def test_every_plot_is_well_formed_and_none_is_missing(report: str) -> None:
    plots = plots_of(report)
    assert len(plots) == 10
    for plot in plots:
        assert ElementTree.fromstring(plot).tag.endswith("svg")


def test_the_same_run_gives_the_same_report_whatever_its_wall_time(report: str) -> None:
    assert report_of(replace(bursty_run(2000), wall_s=1234.5)) == report


def test_settings_are_shown_and_escaped(report: str) -> None:
    assert "H200 &lt;8B&gt;" in report
    assert "H200 <8B>" not in report


def test_events_and_faults_are_named(report: str) -> None:
    for words in ("role switch (2)", "worker start (1)", "worker crash (1)", "out of memory", "0:33:00"):
        assert words in report


def test_a_run_of_one_request_renders() -> None:
    assert "of 1 request of" in report_of(first(bursty_run(100), 1))


def test_a_run_that_never_began_renders() -> None:
    empty = replace(
        unserved(first(bursty_run(100), 0)),
        timeline=no_samples(),
        events=(),
        gpu_seconds=0.0,
        simulated_s=0.0,
    )
    assert "nothing was offered" in report_of(empty)


def test_a_run_of_rejected_requests_says_so() -> None:
    report = report_of(unserved(bursty_run(300)))
    assert "<b>0%</b> of 300 requests" in report
    assert "300 rejected" in report


def test_a_run_of_a_second_and_one_of_a_week_render() -> None:
    for duration_s, words in ((1.0, "per minute"), (7 * 86400.0, "per 30 minutes")):
        assert f"Attainment {words}" in report_of(bursty_run(3000, duration_s=duration_s))


def test_the_file_stays_small_for_many_requests_and_events() -> None:
    result = bursty_run(100_000)
    switches = tuple(
        ClusterEvent(time_s=0.3 * i, kind="role_switch", worker_id="w1", detail="to decode")
        for i in range(10_000)
    )
    assert len(report_of(replace(result, events=switches))) < 2_000_000


def test_numbers_are_short() -> None:
    assert [number(value) for value in (None, 12031, 1234.5, 61.23, 1.0, 0.01234)] == [
        "\u2013",
        "12,031",
        "1,234",
        "61.2",
        "1",
        "0.0123",
    ]


def test_a_percentage_is_100_or_0_only_when_all_or_none_is_meant() -> None:
    assert [percent(share) for share in (None, 0.0, 1e-6, 0.5, 0.99999, 1.0)] == [
        "\u2013",
        "0%",
        "0.1%",
        "50.0%",
        "99.9%",
        "100%",
    ]
