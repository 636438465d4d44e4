"""The load of now from routers' counts: steady loads, jumps, lengths of answers that still go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from planner.estimate import Estimate, estimate
from planner.traffic_history import TrafficHistory
from tests.unit.planned import Load

SEEDS = range(3)


@dataclass
class Watched:
    """A load, and what is estimated of it each second."""

    load: Load
    history: TrafficHistory
    now_s: float = 0.0

    def go_on(self, num_seconds: int, rate_rps: float, **how: Any) -> list[Estimate | None]:
        estimates = []
        for _ in range(num_seconds):
            self.now_s += 1.0
            self.load.go_on(1.0, rate_rps, **how)
            self.history.observe(self.now_s, self.load.routers)
            estimates.append(estimate(tuple(self.history.samples)))
        return estimates

    def last(self, num_seconds: int, rate_rps: float, **how: Any) -> Estimate:
        found = self.go_on(num_seconds, rate_rps, **how)[-1]
        assert found is not None
        return found


def watched(seed: int = 0, **load: Any) -> Watched:
    return Watched(Load(seed=seed, **load), TrafficHistory())


def seconds_until(estimates: list[Estimate | None], low: float, high: float, what: str) -> int:
    """How long until a demand's figure has come into a range, and stays in it."""
    figures = [getattr(each.demand, what) if each else 0.0 for each in estimates]
    inside = [low <= figure <= high for figure in figures]
    assert inside[-1], figures
    return len(inside) - inside[::-1].index(False) if False in inside else 0


class TestRate:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_a_steady_load_is_measured_over_minutes(self, seed: int) -> None:
        found = watched(seed).last(200, 10.0)
        assert found.window_s > 100
        assert found.demand.rate_rps == pytest.approx(10.0, abs=10.0 * 4 * found.rate_error)
        assert found.rate_error < 0.05
        assert found.demand.arrival_dispersion == pytest.approx(1.2, abs=0.4)

    def test_the_stated_error_is_the_one_that_is_made(self) -> None:
        errors = []
        for seed in range(30):
            found = watched(seed, tpot_s=1.0).last(60, 8.0, output=1)
            errors.append((found.demand.rate_rps - 8.0) / (8.0 * found.rate_error))
        assert np.mean(np.abs(errors) < 2.0) > 0.75
        assert abs(np.mean(errors)) < 1.0

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize(("before", "after"), [(10.0, 40.0), (40.0, 10.0), (20.0, 0.5)])
    def test_after_a_jump_only_what_came_since_counts(self, seed: int, before: float, after: float) -> None:
        bench = watched(seed)
        bench.go_on(150, before)
        estimates = bench.go_on(30, after)
        noise = 4 * (after**0.5)
        assert seconds_until(estimates, 0.6 * after - noise, 1.4 * after + noise, "rate_rps") <= 6
        assert estimates[5] is not None
        assert estimates[5].window_s <= 20

    @pytest.mark.parametrize("seed", SEEDS)
    @pytest.mark.parametrize("idle_s", [20, 150])
    def test_a_load_that_comes_after_silence_is_all_there_in_seconds(self, seed: int, idle_s: int) -> None:
        bench = watched(seed)
        bench.go_on(idle_s, 0.0)
        estimates = bench.go_on(60, 9.5)
        assert seconds_until(estimates, 0.65 * 9.5, 1.35 * 9.5, "rate_rps") <= 6

    @pytest.mark.parametrize(("before", "after"), [(10.0, 20.0), (20.0, 10.0)])
    def test_a_rate_that_doubles_or_halves_is_known_well_after_a_quarter_of_a_minute(
        self, before: float, after: float
    ) -> None:
        errors = []
        for seed in range(8):
            bench = watched(seed)
            bench.go_on(120, before)
            found = bench.last(15, after)
            errors.append(found.demand.rate_rps / after - 1.0)
        assert np.sqrt(np.mean(np.square(errors))) < 0.15

    def test_bursts_are_told_from_poisson_arrivals(self) -> None:
        found = watched().last(120, 12.0, bunch=6)
        assert found.demand.arrival_dispersion > 3.0
        assert found.rate_error > watched().last(120, 12.0).rate_error

    def test_many_routers_are_one_load(self) -> None:
        found = watched(num_routers=8).last(120, 16.0)
        assert found.demand.rate_rps == pytest.approx(16.0, rel=0.15)


class TestPrompts:
    def test_lengths_and_what_caches_hold(self) -> None:
        found = watched().last(60, 10.0, prompt=2000, cached=0.75)
        (kind,) = found.demand.prompts
        assert kind.new_tokens == pytest.approx(500, rel=0.01)
        assert kind.cached_tokens == pytest.approx(1500, rel=0.01)
        assert found.demand.prompt_tokens == pytest.approx(2000)

    def test_each_class_has_its_own_share_and_cache_hits(self) -> None:
        bench = watched()
        for _ in range(60):
            bench.load.go_on(1.0, 6.0, prompt=4000, cached=0.9)
            bench.load.go_on(0.0001, 20_000.0, prompt=100)
            bench.now_s += 1.0
            bench.history.observe(bench.now_s, bench.load.routers)
        found = estimate(tuple(bench.history.samples))
        assert found is not None
        short, long = sorted(found.demand.prompts, key=lambda kind: kind.new_tokens + kind.cached_tokens)
        assert (short.new_tokens, short.cached_tokens) == (pytest.approx(100), 0.0)
        assert long.new_tokens == pytest.approx(400, rel=0.01)
        assert long.share == pytest.approx(0.75, abs=0.08)
        assert short.share + long.share == pytest.approx(1.0)

    def test_other_lengths_at_the_same_rate_are_a_change(self) -> None:
        bench = watched()
        bench.go_on(120, 10.0, prompt=500)
        estimates = bench.go_on(20, 10.0, prompt=6000)
        assert seconds_until(estimates, 4500, 6001, "prompt_tokens") <= 6

    @pytest.mark.parametrize("seed", SEEDS)
    def test_few_prompts_of_very_different_lengths_are_no_change(self, seed: int) -> None:
        bench, rng = watched(seed), np.random.default_rng(seed)
        bench.go_on(60, 1.0)
        windows_s = [bench.last(1, 1.0, prompt=int(rng.choice((500, 8000)))).window_s for _ in range(240)]
        assert np.mean(np.array(windows_s[120:]) < 20) < 0.1


class TestAnswers:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_a_rate_that_jumps_does_not_change_the_lengths(self, seed: int) -> None:
        bench = watched(seed)
        bench.go_on(60, 5.0, output=400)
        estimates = bench.go_on(40, 30.0, output=400) + bench.go_on(40, 5.0, output=400)
        for found in estimates:
            assert found is not None
            assert found.demand.output_tokens == pytest.approx(400, rel=0.05)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_longer_and_shorter_answers_are_noticed_before_they_have_ended_many_times(
        self, seed: int
    ) -> None:
        bench = watched(seed)
        bench.go_on(60, 10.0, output=100)
        longer = bench.go_on(40, 10.0, output=700)  # take 14 s each
        assert seconds_until(longer, 150, 2000, "output_tokens") <= 10
        assert seconds_until(longer, 600, 800, "output_tokens") <= 20
        shorter = bench.go_on(40, 10.0, output=100)  # the long ones are still there for 14 s
        assert seconds_until(shorter, 80, 200, "output_tokens") <= 16

    @pytest.mark.parametrize("seed", SEEDS)
    def test_answers_that_only_go_on_tell_that_they_have_become_longer(self, seed: int) -> None:
        bench = watched(seed, tpot_s=0.1)
        bench.go_on(60, 15.0, output=5)
        estimates = bench.go_on(5, 15.0, output=55)  # the first one ends after 5.5 s
        found = estimates[-2]
        assert found is not None
        assert found.demand.output_tokens > 30

    def test_before_the_first_answer_has_ended_they_are_taken_to_be_longer_than_what_was_seen(self) -> None:
        found = watched().last(4, 20.0, output=2000)
        assert found.demand.output_tokens > 200
        assert found.answer_error > 0.3

    def test_kv_in_front_of_a_token_is_prompt_and_half_the_answer(self) -> None:
        found = watched().last(60, 10.0, prompt=1000, output=400)
        assert found.demand.kv_tokens == pytest.approx(1200, rel=0.03)


class TestLittle:
    def test_nothing_is_said_of_nothing(self) -> None:
        assert estimate(()) is None
        assert watched().go_on(10, 0.0)[-1] is None

    def test_one_look_with_some_requests_is_an_estimate(self) -> None:
        bench = watched()
        bench.go_on(1, 0.0)
        found = bench.last(1, 40.0)
        assert found.demand.rate_rps == pytest.approx(40.0, rel=0.5)
        assert 0.0 < found.rate_error < 1.5

    def test_a_long_silence_is_a_rate_of_nothing(self) -> None:
        bench = watched()
        bench.go_on(60, 10.0)
        found = bench.last(60, 0.0)
        assert found.demand.rate_rps == 0.0

    def test_requests_without_answers_are_an_estimate(self) -> None:
        found = watched(tpot_s=1e9).last(30, 10.0)
        assert found.demand.output_tokens >= 1.0
        assert found.demand.kv_tokens is None
