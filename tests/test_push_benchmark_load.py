"""What `benchmarks.push --load` counts in streams of tokens, and the processes that read them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby
from typing import ClassVar

import pytest

from benchmarks.rounds import Load, Round, Times, compare_rounds
from benchmarks.streams import Streams, completed
from benchmarks.table import Pushed, Row, table


def every(step: float, start: float, end: float) -> list[float]:
    """`start`, and so on, without `end`. Steps that are sums of powers of two have no rounding."""
    return [start + step * number for number in range(round((end - start) / step))]


def test_tokens_and_gaps_of_a_span() -> None:
    found = Round(0.0, 20.0, [[0.5, 1.0, 2.0, 2.0, 5.0, 6.0, 19.0], [1.0, 4.0, 11.0]])
    assert found.tokens((1.0, 5.0)) == 5 and found.tokens((2.0, 2.0)) == 0 and found.tokens((5.0, 5.5)) == 1
    assert list(found.gaps((1.5, 5.0))) == [1.0, 0.0, 3.0, 3.0, 7.0]
    assert list(found.gaps((11.0, 15.0))) == [13.0, 4.0]  # the other stream is silent until the end
    for span in ((-1.0, 5.0), (3.0, 20.5), (5.0, 4.0)):
        with pytest.raises(ValueError, match="the round is from"):
            found.tokens(span)
    with pytest.raises(ValueError, match="no token before"):
        list(found.gaps((0.75, 5.0)))
    with pytest.raises(ValueError, match="no token before"):
        list(Round(0.0, 20.0, [[]]).gaps((1.0, 5.0)))
    assert Round(100.0, 120.0, []).same((3.0, 4.5), found) == (103.0, 104.5)


def test_what_pushes_cost() -> None:
    """Two streams with a token each quarter of a second; later pushes take 1 s, in which half of one's are missing."""
    began, push = 10.0, Times(began=12.5, committing=13.25, ended=13.5)  # around: 10.5 to 15.5
    whole = every(0.25, 9.5, 17.0)
    hole = [time for time in whole if not 12.5 < time < 13.5]  # 3 fewer
    first = Round(began, 16.0, [[time for time in whole if not 12.0 < time < 15.0], whole])
    later = Round(began, 16.0, [whole, hole])
    quiet = [Round(40.0, 46.0, [[time + 30.0 for time in whole]] * 2), Round(70.0, 77.0, [every(0.5, 69.5, 77.0)] * 2)]
    found = compare_rounds("keep", [(first, push), (later, push), (first, push)], quiet)
    assert (found.num_streams, found.in_flight) == (2, "keep")
    assert found.longest_first_s == 3.0 and found.longest_s == 3.0 and found.longest_quiet_s == 0.5
    assert compare_rounds("keep", [(first, push), (later, push)], quiet).longest_s == 1.0
    assert found.quiet_tokens == [40, 20] * 2 and found.lost == [30.0 - 37.0, 30.0 - 29.0]
    assert found.quiet_rate == 6.0 and found.normal_s == 0.25
    assert found.receiving_rate == (4 + 3) / 1.5  # in 0.75 s each: 3 and 1, then 0 and 3
    for pushed, without in (([(first, push)], quiet), ([(first, push)] * 2, [])):
        with pytest.raises(ValueError, match="has to be a later push"):
            compare_rounds("keep", pushed, without)
    with pytest.raises(ValueError, match="the round is from"):
        compare_rounds("keep", [(first, push)] * 2, [Round(40.0, 45.0, quiet[0].arrivals)])


def test_tokens_of_one_chunk_are_no_gap() -> None:
    push = Times(12.5, 13.0, 13.0)
    chunks = sorted(3 * every(0.5, 9.0, 17.0))
    found = compare_rounds("keep", [(Round(10.0, 16.0, [chunks]), push)] * 2, [Round(10.0, 16.0, [chunks])])
    assert found.normal_s == 0.5 and found.lost == [0.0] and found.quiet_rate == 6.0


def test_load_has_a_table_of_its_own() -> None:
    load = Load(
        num_streams=8,
        in_flight="keep",
        normal_s=0.007,
        longest_first_s=0.25,
        longest_s=0.027,
        longest_quiet_s=0.009,
        lost=[30.0, -2.0, 10.0],
        quiet_tokens=[4570, 4573, 4560],
        receiving_rate=900.0,
        quiet_rate=1200.0,
    )
    pushed = [Pushed(total_s=0.5, thread_s=0.1, process_s=0.2)] * 2
    row = Row(way="push, keep, 8 streams", num_bytes=10**9, pushes=pushed, load=load)
    lines = table([row], None).splitlines()
    assert lines[3] == "" and len(lines) == 7
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert cells[2] == [
        *("push, keep, 8 streams", "8", "7.0", "27.0", "20.0", "250", "9.0", "10 (-2 to 30)"),
        *("4568 (4560 to 4573)", "900", "1200", "25%"),
    ]
    assert len(cells[0]) == len(cells[2]) and "longest gap: 27.0" in str(row)
    assert len(table([Row(way="x", num_bytes=1, pushes=pushed)], None).splitlines()) == 3


# The processes


def test_a_chunk_says_how_many_tokens_there_were() -> None:
    chunk = {"output_ids": [7], "meta_info": {"completion_tokens": 12, "finish_reason": None}}
    assert completed(f"data: {json.dumps(chunk)}") == 12
    assert completed(f"data: {json.dumps(chunk, separators=(',', ':'))}") == 12
    for wrong in ('data: {"error": {"completion_tokens": 3}}', 'data: {"output_ids": [7]}'):
        with pytest.raises(RuntimeError, match="data: "):
            completed(wrong)


class Serves(BaseHTTPRequestHandler):
    """Of each request 4 tokens a chunk, then 2, for as long as somebody listens; `/abort_request` is noted."""

    aborts: ClassVar[list[str]] = []
    status = 200

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(self.status)
        self.end_headers()
        if self.path == "/abort_request":
            self.aborts.append(json.dumps(body))
            return
        for number in (4, 6):
            self.wfile.write(b'data: {"meta_info": {"completion_tokens": %d}}\n\n' % number)
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *args: object) -> None:
        return


@pytest.fixture
def url() -> Iterator[str]:
    Serves.aborts, Serves.status = [], 200
    server = ThreadingHTTPServer(("127.0.0.1", 0), Serves)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_streams_run_in_rounds_and_each_token_has_a_time(url: str) -> None:
    with Streams(url, 9, 6) as streams:
        for _ in range(2):
            began = streams.begin()
            arrivals = streams.end()
            assert len(arrivals) == 9  # of two processes
            for times in arrivals:
                assert len(times) >= 5 and times == sorted(times) and times[0] <= began
                assert [len(list(chunk)) for _, chunk in groupby(times)][:2] == [4, 2]
    assert Serves.aborts == ['{"abort_all": true}'] * 3


def test_a_stream_that_breaks_is_told(url: str) -> None:
    with Streams(url, 2, 6) as streams:
        Serves.status = 503
        with pytest.raises(RuntimeError, match="503"):
            streams.begin()
            streams.end()
