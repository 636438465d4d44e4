"""Generated loads: rates, lengths, sharing between turns, and the one-line text form."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import ConfigError
from simulator.traces.draws import (
    Bursts,
    FixedLengths,
    LognormalLengths,
    Poisson,
    Sinusoid,
    UniformLengths,
)
from simulator.traces.generator_text import is_workload, workload_from_text
from simulator.traces.generators import Independent, Phase, Phases, generate
from simulator.traces.sessions import Sessions
from simulator.traces.trace import Trace

EXAMPLES = (
    "poisson:rate=5,prompt=3000,output=300,duration=600",
    "bursts:rate=5,cv=4,prompt=100..900,output=300,duration=10m",
    "sinusoid:low=2,high=12,period=1h,prompt=1200~8000,output=50..400,duration=2h",
    "phases:rate=2,prompt=8000,output=100,duration=10m/rate=6,prompt=500,output=400",
    "phases:rate=9,prompt=8,output=10,duration=10,repeat=3/rate=0,duration=20s",
    "sessions:rate=0.5,turns=6,think=20s,user=150,output=250,system=1000,duration=1h",
)


def arrivals_s(trace: Trace) -> np.ndarray:
    return np.array([request.arrival_s for request in trace.requests])


class TestLengths:
    def test_lognormal_meets_its_mean_and_p99(self) -> None:
        lengths = LognormalLengths(mean=3000, p99=20_000).draw(np.random.default_rng(0), 200_000)
        assert lengths.mean() == pytest.approx(3000, rel=0.02)
        assert np.percentile(lengths, 99) == pytest.approx(20_000, rel=0.03)

    def test_lognormal_by_sigma(self) -> None:
        lengths = LognormalLengths(mean=500, sigma=0.5).draw(np.random.default_rng(0), 100_000)
        assert lengths.mean() == pytest.approx(500, rel=0.02)
        assert np.log(lengths).std() == pytest.approx(0.5, rel=0.02)

    def test_uniform_includes_both_ends(self) -> None:
        lengths = UniformLengths(low=2, high=4).draw(np.random.default_rng(0), 1000)
        assert set(lengths.tolist()) == {2, 3, 4}

    def test_fixed(self) -> None:
        assert FixedLengths(tokens=7).draw(np.random.default_rng(0), 3).tolist() == [7, 7, 7]


class TestArrivals:
    def test_poisson(self) -> None:
        times_s = Poisson(rate_rps=5).draw(np.random.default_rng(0), 4000)
        gaps_s = np.diff(times_s)
        assert len(times_s) == pytest.approx(20_000, rel=0.03)
        assert gaps_s.std() / gaps_s.mean() == pytest.approx(1, rel=0.03)

    def test_bursts_keep_the_rate_and_have_the_cv(self) -> None:
        times_s = Bursts(rate_rps=5, cv=3).draw(np.random.default_rng(0), 20_000)
        gaps_s = np.diff(times_s)
        assert len(times_s) == pytest.approx(100_000, rel=0.05)
        assert gaps_s.std() / gaps_s.mean() == pytest.approx(3, rel=0.05)

    def test_a_sinusoid_follows_its_rate(self) -> None:
        wave = Sinusoid(low_rps=2, high_rps=10, period_s=1000)
        times_s = wave.draw(np.random.default_rng(0), 10_000) % 1000
        counts = np.histogram(times_s, bins=10, range=(0, 1000))[0] / 1000
        assert counts == pytest.approx(wave.rate_rps(np.linspace(50, 950, 10)), rel=0.1)

    @given(st.floats(0.1, 50), st.floats(0.05, 20), st.floats(0.5, 60), st.integers(0, 1000))
    @settings(max_examples=50)
    def test_arrivals_are_sorted_and_inside_the_duration(
        self, rate_rps: float, cv: float, duration_s: float, seed: int
    ) -> None:
        for process in (
            Poisson(rate_rps=rate_rps),
            Bursts(rate_rps=rate_rps, cv=cv),
            Sinusoid(low_rps=0, high_rps=rate_rps, period_s=duration_s),
        ):
            times_s = process.draw(np.random.default_rng(seed), duration_s)
            assert np.all(np.diff(times_s) >= 0)
            assert np.all((times_s >= 0) & (times_s < duration_s))


class TestGenerate:
    @pytest.mark.parametrize("text", EXAMPLES)
    def test_one_seed_gives_one_trace(self, text: str) -> None:
        spec = workload_from_text(text)
        trace = generate(spec, 1)
        assert trace == generate(spec, 1)
        assert trace.requests != generate(spec, 2).requests
        assert trace.name == text.partition(":")[0]
        assert all(request.prompt_tokens > 0 < request.output_tokens for request in trace.requests)

    def test_phases_shift_rate_and_lengths(self) -> None:
        long = Phase(
            duration_s=1000, rate_rps=2, prompt=FixedLengths(tokens=8000), output=FixedLengths(tokens=10)
        )
        short = Phase(
            duration_s=500, rate_rps=8, prompt=FixedLengths(tokens=100), output=FixedLengths(tokens=900)
        )
        trace = generate(Phases(phases=(long, short), repeat=2), 0)
        for start_s, phase in ((0, long), (1000, short), (1500, long), (2500, short)):
            part = [r for r in trace.requests if start_s <= r.arrival_s < start_s + phase.duration_s]
            assert len(part) == pytest.approx(phase.rate_rps * phase.duration_s, rel=0.1)
            assert {(r.prompt_tokens, r.output_tokens) for r in part} == {
                (8000, 10) if phase is long else (100, 900)
            }
        assert trace.duration_s < 3000

    def test_no_request_at_all_is_an_error(self) -> None:
        with pytest.raises(ConfigError, match="no request arrived"):
            generate(workload_from_text("poisson:rate=1e-9,prompt=1,output=1,duration=1"), 0)


class TestSessions:
    def test_turns_grow_by_what_was_said(self) -> None:
        spec = Sessions(
            rate_rps=0.01,
            duration_s=200_000,
            turns=5,
            think_s=30,
            user=FixedLengths(tokens=100),
            output=FixedLengths(tokens=60),
            system_tokens=500,
        )
        trace = generate(spec, 0)
        assert {(request.prompt_tokens - 600) % 160 for request in trace.requests} == {0}
        num_sessions = sum(request.prompt_tokens == 600 for request in trace.requests)
        assert len(trace.requests) / num_sessions == pytest.approx(5, rel=0.1)

    @given(
        st.integers(0, 200),
        st.integers(1, 70),
        st.integers(1, 90),
        st.sampled_from([1, 16, 64]),
        st.integers(0, 99),
    )
    @settings(max_examples=40, deadline=None)
    def test_a_later_turn_shares_all_full_pieces_of_the_earlier_ones(
        self, system: int, user: int, output: int, block: int, seed: int
    ) -> None:
        spec = Sessions(
            rate_rps=0.2,
            duration_s=100,
            turns=4,
            think_s=1,
            user=UniformLengths(low=1, high=user),
            output=UniformLengths(low=1, high=output),
            system_tokens=system,
            hash_block_tokens=block,
            max_context_tokens=system + 300,
        )
        try:
            trace = generate(spec, seed)
        except ConfigError:
            return
        num_shared = system // block
        sessions: dict[int, tuple[int, ...]] = {}
        for request in trace.requests:
            assert request.prompt_tokens + request.output_tokens <= system + 300
            hashes = request.block_hashes
            assert len(hashes) == request.prompt_tokens // block
            assert len(set(hashes)) == len(hashes)
            assert hashes[:num_shared] == tuple(range(num_shared))
            if len(hashes) > num_shared:
                earlier = sessions.get(hashes[num_shared], ())
                assert hashes[: len(earlier)] == earlier
                assert len(hashes) >= len(earlier)
                sessions[hashes[num_shared]] = hashes
        own = [piece for hashes in sessions.values() for piece in hashes[num_shared:]]
        assert len(set(own)) == len(own)  # sessions share nothing but the system prompt


class TestText:
    def test_each_kind_becomes_its_specification(self) -> None:
        assert workload_from_text(EXAMPLES[0]) == Independent(
            arrivals=Poisson(rate_rps=5),
            duration_s=600,
            prompt=FixedLengths(tokens=3000),
            output=FixedLengths(tokens=300),
        )
        assert workload_from_text(EXAMPLES[2]) == Independent(
            arrivals=Sinusoid(low_rps=2, high_rps=12, period_s=3600),
            duration_s=7200,
            prompt=LognormalLengths(mean=1200, p99=8000),
            output=UniformLengths(low=50, high=400),
        )
        phases = workload_from_text(EXAMPLES[4])
        assert isinstance(phases, Phases)
        assert phases.repeat == 3
        assert [(phase.rate_rps, phase.duration_s) for phase in phases.phases] == [(9, 10), (0, 20)]
        sessions = workload_from_text(EXAMPLES[5] + ",block=16,context=8000,tpot=20ms")
        assert isinstance(sessions, Sessions)
        assert (sessions.think_s, sessions.system_tokens, sessions.hash_block_tokens) == (20, 1000, 16)
        assert (sessions.max_context_tokens, sessions.assumed_tpot_s) == (8000, 0.02)

    def test_a_load_is_told_from_a_file(self) -> None:
        assert all(is_workload(text) for text in EXAMPLES)
        assert not is_workload("poisson.jsonl")
        assert not is_workload("/data/poisson:1.csv")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "is no load"),
            ("poison:rate=5", "begins with one of poisson:, bursts:"),
            ("poisson:rate=5,prompt=3000", "also needs output, duration"),
            ("poisson:rate", "'rate' is no setting; write name=value"),
            ("poisson:rate=5,rate=6", "rate is given twice"),
            ("poisson:rat=5", "no setting 'rat'; its settings are rate, prompt"),
            ("poisson:rate=-5,prompt=1,output=1,duration=1", "rate is '-5'; write a number"),
            ("poisson:rate=0,prompt=1,output=1,duration=1", "rate must be above 0"),
            ("poisson:rate=5,prompt=0,output=1,duration=1", "at least 1 token"),
            ("poisson:rate=5,prompt=x,output=1,duration=1", "prompt is 'x'; write tokens"),
            ("poisson:rate=5,prompt=9..1,output=1,duration=1", "no less than the lowest"),
            ("poisson:rate=5,prompt=10~5,output=1,duration=1", "p99 must be from the mean"),
            ("poisson:rate=5,prompt=1,output=1,duration=1d", "write a time such as"),
            ("poisson:rate=1e999,prompt=1,output=1,duration=1", "rate must be above 0"),
            ("bursts:rate=5,cv=0,prompt=1,output=1,duration=1", "cv must be"),
            ("sinusoid:low=5,high=2,period=9,prompt=1,output=1,duration=1", "low must be at most high"),
            ("phases:rate=5,prompt=1,output=1", "also needs duration"),
            ("phases:rate=5,prompt=1,output=1,duration=1,repeat=2/repeat=3", "repeat is given twice"),
            ("phases:rate=5,prompt=1,output=1,duration=1,repeat=0", "repeat must be at least 1"),
            (EXAMPLES[5] + ",context=900", "room for the system prompt"),
            (EXAMPLES[5] + ",block=0", "block must be at least 1"),
            (EXAMPLES[5].replace("1000", "1.5"), "system is '1.5'; write a whole number"),
        ],
    )
    def test_what_is_wrong_is_named(self, text: str, message: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(message)):
            workload_from_text(text)

    def test_a_load_too_large_is_refused_before_it_is_drawn(self) -> None:
        for kind in ("poisson:rate=1e7", "bursts:rate=1e7,cv=2"):
            with pytest.raises(ConfigError, match="lower the rate"):
                generate(workload_from_text(f"{kind},prompt=1,output=1,duration=1h"), 0)
