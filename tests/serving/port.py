"""A server at a real port, in a thread of the test's own process, and rude ways to talk to it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from andromeda.serving.app import create_app
from andromeda.serving.pieces import Service
from andromeda.serving.server import listen, run_server
from andromeda.serving.state import ServerState


@dataclass(frozen=True)
class Port:
    state: ServerState
    number: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.number}"

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        client = socket.socket()
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(30)
        client.connect(("127.0.0.1", self.number))
        return client

    def say(self, request: bytes) -> bytes:
        """All that comes back until the server closes the connection."""
        with self.connect() as client:
            client.sendall(request)
            return read_all(client)


def read_all(client: socket.socket) -> bytes:
    received = b""
    try:
        while piece := client.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def post(route: str, body: bytes, *headers: str) -> bytes:
    """A request as it goes over the wire; the connection is to be closed behind the answer."""
    lines = [f"POST {route} HTTP/1.1", "host: localhost", "content-type: application/json", "connection: close"]
    return "\r\n".join([*lines, f"content-length: {len(body)}", *headers, "", ""]).encode() + body


@contextmanager
def serving(state: ServerState, service: Service | None = None, key: str | None = None) -> Iterator[Port]:
    """The server, until the end of the block, when it drains."""

    async def load(state: ServerState) -> None:
        state.service = service or state.service

    listener = listen("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that a client that does not read is soon felt
    port = Port(state, listener.getsockname()[1])
    thread = threading.Thread(target=run_server, args=(create_app(state, key), state, load, listener), daemon=True)
    thread.start()
    try:
        yield port
    finally:
        state.draining = True
        thread.join(60)
        assert not thread.is_alive(), "the server does not stop"


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not come to be"
        time.sleep(0.01)
