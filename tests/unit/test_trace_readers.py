"""Traces from files: formats, units, coarse timestamps, block hashes, errors, and the way back."""

from __future__ import annotations

import gzip
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import ConfigError
from simulator.traces.edits import head, scale_rate, thin, window
from simulator.traces.readers import read_trace
from simulator.traces.times import coarse_step_s, spread
from simulator.traces.trace import Trace, TraceRequest
from simulator.traces.writer import write_trace

DATA = Path(__file__).parents[1] / "data" / "traces"


def read_text(tmp_path: Path, text: str, columns: Mapping[str, str] | None = None, *, seed: int = 0) -> Trace:
    path = tmp_path / "some.trace"
    path.write_text(text)
    return read_trace(path, columns=columns, seed=seed)


def arrivals_s(trace: Trace) -> list[float]:
    return [request.arrival_s for request in trace.requests]


def ideal_share(trace: Trace) -> float:
    """Input tokens an unlimited prefix cache would hold, of all."""
    seen: set[int] = set()
    num_hits = 0
    for request in trace.requests:
        for piece in request.block_hashes:
            if piece not in seen:
                break
            num_hits += 1
        seen.update(request.block_hashes)
    return num_hits * trace.hash_block_tokens / sum(request.prompt_tokens for request in trace.requests)


class TestPublishedFormats:
    def test_mooncake(self) -> None:
        trace = read_trace(DATA / "mooncake_conversation.jsonl")
        assert trace.name == "mooncake_conversation"
        assert trace.hash_block_tokens == 512
        assert len(trace.requests) == 150
        assert np.mean([request.prompt_tokens for request in trace.requests]) == pytest.approx(14263, abs=1)
        assert np.mean([request.output_tokens for request in trace.requests]) == pytest.approx(365, abs=1)
        assert trace.requests[0].arrival_s == 0
        assert ideal_share(trace) == pytest.approx(0.0457, abs=1e-4)

    def test_only_full_pieces_count(self) -> None:
        for request in read_trace(DATA / "mooncake_synthetic.jsonl").requests:
            assert len(request.block_hashes) == request.prompt_tokens // 512

    def test_mooncake_arrivals_spread_inside_the_steps_they_came_in(self) -> None:
        path = DATA / "mooncake_conversation.jsonl"
        stamps_s = np.array([json.loads(line)["timestamp"] / 1e3 for line in path.read_text().splitlines()])
        trace = read_trace(path, seed=3)
        late_s = np.array(arrivals_s(trace)) - stamps_s
        assert len(set(arrivals_s(trace))) == len(trace.requests)
        assert np.ptp(late_s) < 3.01
        assert np.ptp(late_s) > 2.5
        lengths = [json.loads(line)["input_length"] for line in path.read_text().splitlines()]
        assert [request.prompt_tokens for request in trace.requests] == lengths  # order of the file
        assert arrivals_s(trace) == arrivals_s(read_trace(path, seed=3))
        assert arrivals_s(trace) != arrivals_s(read_trace(path, seed=4))

    def test_azure(self) -> None:
        trace = read_trace(DATA / "azure2023_conv.csv")
        assert len(trace.requests) == 300
        assert np.mean([request.prompt_tokens for request in trace.requests]) == 900
        assert arrivals_s(trace)[:2] == [0.0, 4.314579]  # 7 digits, as recorded
        assert trace.requests[0] == TraceRequest(arrival_s=0.0, prompt_tokens=374, output_tokens=44)

    def test_azure_of_2024_has_zones(self, tmp_path: Path) -> None:
        text = (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n"
            "2024-05-10 02:00:00.017335+02:00,2399,6\n2024-05-10T00:00:01Z,10,7\n"
        )
        assert arrivals_s(read_text(tmp_path, text)) == [0.0, 0.007405, 0.99007]

    def test_servegen_windows_become_requests(self) -> None:
        trace = read_trace(DATA / "servegen_m_large_10min.csv", keep_share=0.001, seed=1)
        table = np.loadtxt(DATA / "servegen_m_large_10min.csv", delimiter=",", skiprows=1)
        expected = table[:, 1] * 600 * 0.001
        assert len(trace.requests) == pytest.approx(expected.sum(), rel=0.02)
        assert trace.duration_s == pytest.approx(86400, rel=0.01)
        mean_input = (table[:, 3] * expected).sum() / expected.sum()
        mean_output = (table[:, 4] * expected).sum() / expected.sum()
        prompts = [request.prompt_tokens for request in trace.requests]
        assert np.mean(prompts) == pytest.approx(mean_input, rel=0.05)
        assert np.mean([request.output_tokens for request in trace.requests]) == pytest.approx(
            mean_output, rel=0.05
        )
        counts = np.histogram(arrivals_s(trace), bins=144, range=(0, 86400))[0]
        assert np.corrcoef(counts, expected)[0, 1] > 0.9

    def test_servegen_is_cut_where_it_gets_too_long(self, caplog: pytest.LogCaptureFixture) -> None:
        path = DATA / "servegen_m_large_10min.csv"
        trace = read_trace(path, max_drawn_requests=5000)
        assert len(trace.requests) == pytest.approx(5000, rel=0.05)
        assert "only the first" in caplog.text
        caplog.clear()
        part = read_trace(path, start_s=900, duration_s=10)
        assert len(part.requests) == pytest.approx(1797, rel=0.1)
        assert part.duration_s < 10
        assert not caplog.text


class TestGenericColumns:
    def test_common_names_are_found(self, tmp_path: Path) -> None:
        expected = [(0.0, 10, 5), (0.5, 20, 6)]
        for text in (
            "arrived_at,num_prefill_tokens,num_decode_tokens\n0.25,10,5\n0.75,20,6\n",
            "Timestamp;Request tokens;Response tokens\n1.5;10;5\n2;20;6\n",
            '{"arrival_time_ms": 100, "prompt_tokens": 10, "completion_tokens": 5}\n'
            '{"arrival_time_ms": 600, "prompt_tokens": 20, "completion_tokens": 6}\n',
            '{"timestamp": 1.5, "chat_id": 1, "input_length": 10, "output_length": 5}\n'
            '{"timestamp": 2.0, "chat_id": 2, "input_length": 20, "output_length": 6}\n',
        ):
            trace = read_text(tmp_path, text)
            assert [(r.arrival_s, r.prompt_tokens, r.output_tokens) for r in trace.requests] == expected

    def test_columns_are_mapped_with_units(self, tmp_path: Path) -> None:
        columns = {
            "prompt_tokens": "in",
            "output_tokens": "out",
            "block_hashes": "h",
            "hash_block_tokens": "4",
        }
        for unit, per_s in (("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)):
            text = f"in,out,when,h\n10,1,{2 * per_s},7 8 9\n8,2,{3 * per_s},7 8\n"
            trace = read_text(tmp_path, text, {**columns, "arrival_s": f"when:{unit}"})
            assert arrivals_s(trace) == [0.0, 1.0]
            assert [request.block_hashes for request in trace.requests] == [(7, 8), (7, 8)]
            assert trace.hash_block_tokens == 4

    def test_times_since_1970_keep_their_digits(self, tmp_path: Path) -> None:
        for stamps in (
            ("1700000000.25", "1700000000.75"),
            ("1700000000250", "1700000000750"),
            ("1700000000250000000", "1700000000750000000"),
        ):
            text = "ts,prompt_tokens,output_tokens\n" + "".join(f"{stamp},1,1\n" for stamp in stamps)
            assert arrivals_s(read_text(tmp_path, text)) == [0.0, 0.5]

    def test_whole_numbers_are_seconds_unless_that_is_far_too_slow(self, tmp_path: Path) -> None:
        rows = "ts,prompt_tokens,output_tokens\n0,1,1\n{},1,1\n"
        assert read_text(tmp_path, rows.format(5)).duration_s == 5
        assert read_text(tmp_path, rows.format(4000)).duration_s == 4

    def test_rows_are_sorted_by_time(self, tmp_path: Path) -> None:
        trace = read_text(tmp_path, "ts,prompt_tokens,output_tokens\n3.5,30,1\n1.5,10,1\n2.5,20,1\n")
        assert [request.prompt_tokens for request in trace.requests] == [10, 20, 30]

    def test_gzip_is_told_by_content(self, tmp_path: Path) -> None:
        packed = tmp_path / "mooncake_synthetic.jsonl.gz"
        packed.write_bytes(gzip.compress((DATA / "mooncake_synthetic.jsonl").read_bytes()))
        assert read_trace(packed) == read_trace(DATA / "mooncake_synthetic.jsonl")

    def test_rows_without_tokens_are_left_out_and_counted(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        text = "ts,prompt_tokens,output_tokens\n0.5,0,5\n1.5,10,5\n2.5,10,0\n3.5,,4\n4.5,7.0,1\n"
        trace = read_text(tmp_path, text)
        assert [(r.arrival_s, r.prompt_tokens) for r in trace.requests] == [(0.0, 10), (3.0, 7)]
        assert "3 of 5 rows" in caplog.text


class TestBlockHashes:
    def row(self, num_tokens: int, hashes: object, **more: object) -> str:
        fields = {"timestamp": 0, "input_length": num_tokens, "output_length": 1, "hash_ids": hashes}
        return json.dumps(fields | more) + "\n"

    def test_another_size_is_found_from_the_counts(self, tmp_path: Path) -> None:
        text = self.row(100, list(range(7))) + self.row(33, [0, 1, 9])
        trace = read_text(tmp_path, text)
        assert trace.hash_block_tokens == 16
        assert [len(request.block_hashes) for request in trace.requests] == [6, 2]

    def test_a_stated_size_wins(self, tmp_path: Path) -> None:
        trace = read_text(tmp_path, self.row(100, [1, 2, 3], hash_block_tokens=32))
        assert trace.hash_block_tokens == 32
        assert trace.requests[0].block_hashes == (1, 2, 3)

    def test_names_that_are_text_are_numbered(self, tmp_path: Path) -> None:
        trace = read_text(tmp_path, self.row(1024, ["ab", "cd"]) + self.row(1024, ["ab", "ef"]))
        assert [request.block_hashes for request in trace.requests] == [(0, 1), (0, 2)]

    def test_counts_that_fit_no_size_are_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="hash_block_tokens=16"):
            read_text(tmp_path, self.row(100, [1, 2, 3]) + self.row(100, [1]))


class TestCoarseTimestamps:
    def test_a_fixed_step_with_gaps_and_jitter_is_found(self) -> None:
        rng = np.random.default_rng(0)
        steps = np.sort(rng.integers(0, 300, size=900))
        jitter_s = rng.integers(-1, 2, size=300) / 1e3
        assert coarse_step_s(3.0 * steps + jitter_s[steps]) == pytest.approx(3.0, rel=1e-3)

    def test_fine_timestamps_are_left_alone(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        assert coarse_step_s(np.sort(rng.random(5000) * 1000).round(3)) == 0
        assert coarse_step_s(np.repeat(np.sort(rng.random(500) * 1000), 4)) == 0  # real bursts
        trace = read_text(tmp_path, "ts,prompt_tokens,output_tokens\n" + "0.5,1,1\n" * 5)
        assert arrivals_s(trace) == [0.0] * 5

    def test_a_step_can_be_given(self) -> None:
        path = DATA / "mooncake_conversation.jsonl"
        assert len(set(arrivals_s(read_trace(path, spread_step_s=0)))) < 30
        with pytest.raises(ConfigError, match="step"):
            read_trace(path, spread_step_s=-1)

    @given(
        st.lists(st.integers(0, 30), min_size=1, max_size=60), st.floats(0.1, 10), st.integers(0, 2**32 - 1)
    )
    def test_spreading_keeps_each_request_in_its_step(
        self, steps: list[int], step_s: float, seed: int
    ) -> None:
        times_s = np.sort(np.array(steps)) * step_s
        moved_s = spread(times_s, step_s, np.random.default_rng(seed))
        assert np.all(np.diff(moved_s) >= 0)
        assert np.all(moved_s >= times_s)
        assert np.all(moved_s <= times_s + step_s * (1 + 1e-9))


HEADER = "ts,prompt_tokens,output_tokens\n"


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "is empty"),
            ("\n\n", "is empty"),
            (HEADER, "no rows"),
            ("a,b,c\n1,2,3\n", r"no column for arrival_s among 'a', 'b', 'c'; name it"),
            ("ts,prompt_tokens\n1,2\n", "no column for output_tokens"),
            (HEADER + "1,2,3\n1,2\n", "line 3: 2 cells where the header has 3"),
            (HEADER + "1,2,3\n1,x,3\n", "line 3: prompt_tokens is 'x'"),
            (HEADER + "1,2,3\n\n1,2,-3\n", "line 4: output_tokens is '-3'"),
            (HEADER + "1,2,3\n1,2.5,3\n", "line 3: prompt_tokens is '2.5'"),
            (HEADER + "1,2,3\nsoon,2,3\n", "line 3: ts is 'soon'"),
            (HEADER + "1,2,3\nnan,2,3\n", "line 3: ts is 'nan'"),
            (HEADER + "2024-05-10 00:00:00,2,3\n2024-05-40 00:00:00,2,3\n", "line 3: ts is '2024-05-40"),
            (HEADER + "1,0,3\n", "no row has both"),
            ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n{"timest', "line 2: not JSON"),
            ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n[1]\n', "line 2: not a JSON object"),
            ('{"timestamp": null, "input_length": 1, "output_length": 1}\n', "line 1: timestamp is None"),
            ('{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": 3}\n', "no list"),
            ("[{}]", "one JSON array"),
            ("t_s,req_per_s,mean_input_tokens,mean_output_tokens\n0,1,1,1\n", "two or more"),
            ("t_s,req_per_s,mean_input_tokens,mean_output_tokens\n0,1,1,1\n9,-1,1,1\n", "line 3: req_per_s"),
            (
                "t_s,req_per_s,mean_input_tokens,mean_output_tokens\n9,1,1,1\n9,1,1,1\n",
                "line 3: t_s must grow",
            ),
            ("t_s,req_per_s,mean_input_tokens,mean_output_tokens\n0,0,1,1\n9,0,1,1\n", "no request falls"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            read_text(tmp_path, text)

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"arrival": "ts"}, "unknown trace field 'arrival'"),
            ({"arrival_s": "when"}, "no column 'when' for arrival_s"),
            ({"arrival_s": "ts:h"}, "unknown unit of time 'h'"),
            ({"hash_block_tokens": "0"}, "at least 1"),
        ],
    )
    def test_a_wrong_mapping_is_named(self, tmp_path: Path, columns: dict[str, str], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            read_text(tmp_path, HEADER + "1,2,3\n", columns)

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="does not exist"):
            read_trace(tmp_path / "none.csv")
        with pytest.raises(ConfigError, match="cannot be read"):
            read_trace(tmp_path)
        broken = tmp_path / "broken.csv.gz"
        broken.write_bytes(gzip.compress(b"ts,prompt_tokens\n" * 100)[:40])
        with pytest.raises(ConfigError, match="cannot be read"):
            read_trace(broken)
        broken.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ConfigError, match="not text"):
            read_trace(broken)

    @given(st.data())
    @settings(max_examples=150, deadline=None)
    def test_any_content_is_read_or_refused(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        cells = st.one_of(
            st.integers().map(str),
            st.floats().map(str),
            st.sampled_from(["", "2024-05-10 00:00:00", "x", "7 8"]),
        )
        header = data.draw(
            st.sampled_from(
                [
                    "timestamp,input_length,output_length,hash_ids",
                    "ts,prompt_tokens,output_tokens,hash_ids",
                    "t_s,req_per_s,mean_input_tokens,mean_output_tokens",
                ]
            )
        )
        rows = data.draw(st.lists(st.lists(cells, min_size=4, max_size=4), max_size=4))
        path = tmp_path_factory.getbasetemp() / "any.csv"
        path.write_text("\n".join([header, *map(",".join, rows)]))
        try:
            trace = read_trace(path, max_drawn_requests=100)
        except ConfigError:
            return
        assert trace.requests[0].arrival_s == 0
        assert all(request.prompt_tokens > 0 < request.output_tokens for request in trace.requests)

    @pytest.mark.parametrize(
        "arguments", [{"start_s": -1}, {"duration_s": 0}, {"keep_share": 0}, {"start_s": 1e9}]
    )
    def test_parts_that_make_no_sense(self, arguments: dict[str, float]) -> None:
        with pytest.raises(ConfigError):
            read_trace(DATA / "azure2023_conv.csv", **arguments)  # type: ignore[arg-type]


class TestEdits:
    def test_parts_and_rates(self) -> None:
        trace = read_trace(DATA / "azure2023_conv.csv")
        assert len(head(trace, num_requests=7).requests) == 7
        assert head(trace, duration_s=10.0).duration_s < 10
        part = window(trace, 20.0, 40.0)
        assert 0 <= part.requests[0].arrival_s < part.duration_s < 20
        assert len(part.requests) == sum(20 <= time_s < 40 for time_s in arrivals_s(trace))
        assert scale_rate(trace, 2.0).duration_s == trace.duration_s / 2
        assert set(arrivals_s(thin(trace, 0.5, 0))) < set(arrivals_s(trace))
        assert len(thin(trace, 0.5, 0).requests) == pytest.approx(150, abs=40)

    def test_edits_that_make_no_sense(self) -> None:
        trace = Trace(name="none", requests=())
        for edit in (
            lambda: scale_rate(trace, 0.0),
            lambda: head(trace, num_requests=-1),
            lambda: window(trace, 5.0, 4.0),
            lambda: thin(trace, 2.0, 0),
        ):
            with pytest.raises(ConfigError):
                edit()


request_lists = st.lists(
    st.builds(
        TraceRequest,
        arrival_s=st.floats(0, 1e7, allow_subnormal=False),
        prompt_tokens=st.integers(1, 10**6),
        output_tokens=st.integers(1, 10**5),
        block_hashes=st.just(()),
    ),
    min_size=1,
    max_size=30,
)


class TestWriter:
    @given(request_lists)
    def test_a_written_trace_is_read_back_as_it_was(
        self, tmp_path_factory: pytest.TempPathFactory, requests: list[TraceRequest]
    ) -> None:
        trace = Trace(name="out", requests=tuple(sorted(requests, key=lambda r: r.arrival_s)))
        path = tmp_path_factory.mktemp("written") / "out.jsonl"
        write_trace(trace, path)
        assert read_trace(path) == trace

    def test_hashes_and_their_size_come_back(self, tmp_path: Path) -> None:
        request = TraceRequest(arrival_s=0.1, prompt_tokens=40, output_tokens=2, block_hashes=(5, 6))
        trace = Trace(name="out", requests=(request, request), hash_block_tokens=16)
        for name in ("out.jsonl", "out.jsonl.gz"):
            write_trace(trace, tmp_path / name)
            assert read_trace(tmp_path / name) == trace
        assert (tmp_path / "out.jsonl.gz").read_bytes()[:2] == b"\x1f\x8b"

    def test_coarse_arrivals_that_were_meant_stay(self, tmp_path: Path) -> None:
        requests = tuple(
            TraceRequest(arrival_s=3.0 * (number // 5), prompt_tokens=1, output_tokens=1)
            for number in range(50)
        )
        write_trace(Trace(name="out", requests=requests), tmp_path / "out.jsonl")
        assert read_trace(tmp_path / "out.jsonl").requests == requests

    def test_an_empty_trace_or_a_missing_folder_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no requests"):
            write_trace(Trace(name="none", requests=()), tmp_path / "none.jsonl")
        trace = read_trace(DATA / "azure2023_conv.csv")
        with pytest.raises(ConfigError, match="cannot be written"):
            write_trace(trace, tmp_path / "no" / "none.jsonl")


def test_thirty_thousand_rows_take_a_second_or_two(tmp_path: Path) -> None:
    lines = (DATA / "azure2023_conv.csv").read_text().splitlines()
    start = time.process_time()
    trace = read_text(tmp_path, "\n".join([lines[0], *lines[1:] * 100]) + "\n")
    assert len(trace.requests) == 30_000
    assert time.process_time() - start < 5


def test_a_suspicious_rate_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        json.dumps({"timestamp": second / 10, "input_length": 1, "output_length": 1}) for second in range(20)
    ]
    with caplog.at_level(logging.WARNING):
        read_text(tmp_path, "\n".join(rows))
    assert "give the unit" in caplog.text
