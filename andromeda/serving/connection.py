"""One client's connection: HTTP as uvicorn has it, with no patience for a client that dawdles.

uvicorn waits for ever for the rest of a request, and for a client to take what it is sent; here both have a time.
"""

from __future__ import annotations

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from andromeda.serving.errors import ApiError, bad_request
from andromeda.serving.limits import Limits

TOO_SLOW = ApiError(408, "the request did not come in time; send all of it at once", code="request_timeout")


def protocol_of(limits: Limits) -> type[asyncio.Protocol]:
    """What uvicorn is to make for each connection."""

    class Connection(BoundedConnection):
        client_seconds, max_connections = limits.client_seconds, limits.max_connections

    return Connection


class BoundedConnection(H11Protocol):
    """Ends after `client_seconds` in which a request that was begun is not complete, or what was sent is not taken.

    An answer may come before all of the request, as where the body is too large; the rest is then read and dropped.
    """

    client_seconds: float
    max_connections: int
    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
            return
        transport.set_write_buffer_limits(high=0)  # then writing is paused as long as anything is left to send
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_reading()
        self._stop_writing()

    # ---- a request that does not come ------------------------------------------------------------

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self._await_request()
        else:
            self._stop_reading()

    def _await_request(self) -> None:
        if self._reading is None and not self.transport.is_closing():
            self._reading = self.loop.call_later(self.client_seconds, self._give_up)

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _give_up(self) -> None:
        waited_for = self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE)
        if waited_for and (self.conn.their_state is h11.SEND_BODY or self.conn.trailing_data[0]):
            self._refuse(TOO_SLOW)
        else:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        self._refuse(bad_request(msg))

    def _refuse(self, error: ApiError) -> None:
        body = json.dumps(error.body()).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        response = h11.Response(status_code=error.status, headers=headers, reason=STATUS_PHRASES[error.status])
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    # ---- a client that does not take what is sent ------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_writing()
        self._writing = self.loop.call_later(self.client_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_writing()

    def _stop_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
