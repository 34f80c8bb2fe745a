"""Connections to a server: kept open, one write a message, and taken up again when the server has closed them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sender.connections import Connections
from sender.control import HttpControl
from shared.errors import ConfigError, ServerUnreachableError


class Echo(ThreadingHTTPServer):
    """Answers with what it was sent; counts connections, and closes them once they are idle for `idle_s`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.num_connections, self.idle_s, self.says_goodbye = 0, 60.0, False
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Echo

    def setup(self) -> None:
        self.server.num_connections += 1
        super().setup()
        self.connection.settimeout(self.server.idle_s)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        if self.server.says_goodbye:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""


@pytest.fixture
def server() -> Iterator[Echo]:
    made = Echo()
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def post(connections: Connections, body: bytes) -> bytes:
    status, answer = connections.post("/any", body, {}, timeout_s=10.0)
    assert status == 200
    return answer


def test_one_connection_carries_all_messages(server: Echo) -> None:
    connections = Connections(server.url)
    assert [post(connections, bytes([number])) for number in range(5)] == [bytes([number]) for number in range(5)]
    assert server.num_connections == 1
    connections.close()


def test_a_connection_that_the_server_has_closed_is_made_again(server: Echo) -> None:
    server.idle_s = 0.05
    connections = Connections(server.url)
    assert post(connections, b"a") == b"a"
    time.sleep(0.5)
    assert post(connections, b"b") == b"b"
    assert server.num_connections == 2
    server.says_goodbye = True
    assert post(connections, b"c") == post(connections, b"c") == b"c"
    assert server.num_connections == 3
    connections.close()


def test_a_connection_that_was_idle_for_long_is_not_trusted(server: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands between may have forgotten it without a word: whoever waits for its answer waits in vain."""
    connections = Connections(server.url)
    assert post(connections, b"a") == b"a"
    monkeypatch.setattr("sender.connections._MOST_IDLE_S", 0.0)
    assert post(connections, b"b") == b"b"
    assert server.num_connections == 2 and len(connections._idle) == 1
    connections.close()


def test_a_message_leaves_in_one_write(server: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    connections, writes, send = Connections(server.url), list[bytes](), HTTPConnection.send

    def noted(connection: HTTPConnection, data: bytes) -> None:
        writes.append(data)
        send(connection, data)

    monkeypatch.setattr(HTTPConnection, "send", noted)
    for body in (b"first", b"second"):
        assert post(connections, body) == body
    assert len(writes) == 2 and writes[1].startswith(b"POST /any ") and writes[1].endswith(b"\r\n\r\nsecond")
    connections.close()


def test_threads_have_connections_of_their_own(server: Echo) -> None:
    connections = Connections(server.url)
    with ThreadPoolExecutor(4) as pool:
        bodies = [str(number).encode() * 100 for number in range(200)]
        assert list(pool.map(lambda body: post(connections, body), bodies)) == bodies
    assert server.num_connections <= 4
    connections.close()
    assert not connections._idle
    assert post(connections, b"late") == b"late"  # what a watch asks beside the end of its sender
    assert not connections._idle


def test_a_server_that_is_not_there() -> None:
    connections = Connections("http://127.0.0.1:9")
    with pytest.raises(ServerUnreachableError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        connections.post("/any", b"", {}, timeout_s=5.0)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("127.0.0.1:30000", "no server URL"),
        ("ftp://host:1", "no server URL"),
        ("http://", "no server URL"),
        ("http://host:port", "no server URL"),
        ("http://[::1:30000", "no server URL"),
        ("http://host:1/v1", "has a path"),
        ("http://host:1?x=1", "has a path"),
        ("http://me:secret@host:1", "the URL of host has a user"),
    ],
)
def test_what_is_no_url_of_a_server(url: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as raised:
        HttpControl(url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("url", ["http://[::1]:30000", "https://host", "http://host:1/"])
def test_urls_of_servers(url: str) -> None:
    with HttpControl(url) as control:
        assert control.name == url.rstrip("/")


@pytest.mark.parametrize("key", ["two\r\nX-Other: lines", "schlüssel"])
def test_a_key_that_no_header_can_hold(key: str) -> None:
    with pytest.raises(ConfigError, match="admin_key has characters") as raised:
        HttpControl("http://host:1", admin_key=key)
    assert key not in str(raised.value)
