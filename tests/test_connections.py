"""Limits of connections: slow requests, large headers, unread responses, and too many connections."""

import socket
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial

import pytest
import uvicorn

from gptq_belle.serving.connections import Connections, GuardedProtocol

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
LARGE = 32 << 20  # bytes of a response, more than the buffers of two sockets
WAIT = 20.0  # seconds until a test that waits for something fails


async def application(scope, receive, send):
    """Answer with the size of the body, or with LARGE bytes."""
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message["body"])
        if not message["more_body"]:
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    body = b"x" * LARGE if scope["path"] == "/large" else str(size).encode()
    await send({"type": "http.response.body", "body": body})


@contextmanager
def listening(**limits):
    fast = {"limit": 20, "head_seconds": 0.4, "body_seconds": 0.4, "stall_seconds": 0.4} | limits
    protocol = partial(GuardedProtocol, Connections(**fast))
    config = uvicorn.Config(application, http=protocol, lifespan="off", log_level="critical", timeout_keep_alive=1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield server, listener.getsockname()
        finally:
            server.force_exit = server.should_exit = True
            thread.join(WAIT)
            assert not thread.is_alive()


def connect(address, data=b""):
    found = socket.create_connection(address, timeout=WAIT)
    found.sendall(data)
    return found


def rest(connection):
    """All bytes until the server closes the connection."""
    found = b""
    with suppress(ConnectionResetError):
        while data := connection.recv(1 << 16):
            found += data
    return found


def status(response):
    return int(response.split()[1])


@pytest.mark.parametrize(("sent", "expected"), [
    (b"", None), (b"GET / HT", 408), (GET + b"X: 1", 408), (GET + b"Content-Length: 5\r\n\r\nab", 408)])
def test_request_that_does_not_arrive_is_closed(sent, expected):
    with listening() as (_, address), connect(address, sent) as slow:
        response = rest(slow)
        assert (status(response) if response else None) == expected
        assert not response or b'"code": "request_timeout"' in response


def test_head_that_trickles_in_is_closed():
    with listening() as (_, address), connect(address, GET) as slow:
        start = time.monotonic()
        with suppress(OSError):
            while time.monotonic() < start + WAIT:
                slow.sendall(b"X: 1\r\n")
                time.sleep(0.02)
        assert time.monotonic() < start + WAIT / 2


@pytest.mark.parametrize("head", [
    GET + b"X: " + b"x" * 70_000 + b"\r\n\r\n", GET + b"X: " + b"x" * 70_000, b"GET /" + b"x" * 70_000,
    GET + b"".join(b"X%d: 1234567890\r\n" % number for number in range(5000)) + b"\r\n", b"G" * 70_000])
def test_large_head_is_refused(head):
    with listening() as (_, address), connect(address, head) as large:
        assert status(rest(large)) == (400 if head.startswith(b"GG") else 431)


def test_complete_requests_of_one_connection_are_answered():
    body = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000
    first = GET + b"X: " + b"x" * 60_000 + b"\r\n\r\n"
    with listening() as (_, address), connect(address, first + body + GET) as client:
        client.sendall(b"Connection: close\r\n\r\n")
        response = rest(client)
        assert response.count(b"HTTP/1.1 200") == 3
        assert b"100000" in response


@pytest.mark.parametrize("after", [b"", b"\r\n", b"GET /"])
def test_idle_connection_is_closed(after):
    with listening() as (_, address), connect(address, GET + b"\r\n") as idle:
        time.sleep(0.2)
        idle.sendall(after)
        assert rest(idle).count(b"HTTP/1.1 200") == 1


def test_response_that_nobody_reads_is_dropped():
    with listening() as (server, address), connect(address, b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        deadline = time.monotonic() + WAIT
        while not server.server_state.connections and time.monotonic() < deadline:
            time.sleep(0.01)
        while server.server_state.connections and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not server.server_state.connections


def test_new_connection_displaces_the_one_that_waits_the_longest():
    with listening(limit=3, head_seconds=WAIT, body_seconds=WAIT) as (_, address):
        busy = connect(address, GET + b"Content-Length: 1\r\n\r\n")
        waiting = [connect(address, b"GET /") for _ in range(5)]
        with connect(address, GET + b"Connection: close\r\n\r\n") as client:
            assert status(rest(client)) == 200
        assert rest(waiting[0]) == b""
        busy.sendall(b"x")
        assert status(busy.recv(1000)) == 200
        for one in (busy, *waiting):
            one.close()
