"""What stands before every route: the key, a name for each request, its line in the log."""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
import re
import secrets
from collections.abc import Iterator
from time import perf_counter
from typing import Any

from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from andromeda.serving.errors import ApiError
from andromeda.serving.metrics import Metrics

LOG = logging.getLogger(__name__)
OPEN = "/health"  # asks for no key
THIS_MACHINE = re.compile(r"(127(\.\d{1,3}){3}|localhost|\[::1\])(:\d+)?", re.IGNORECASE)
FAILURE = ApiError(500, "the server failed; its log says why", code="internal")
GONE = 499  # in metrics, as nginx has it: the client went away before any answer
CHALLENGE = 'Bearer, Basic realm="andromeda"'  # at the second a browser asks its user for the key


class Guard:
    """ASGI middleware, the outermost.

    Args:
        key: that every route but /health asks for. None: none, and then the request has to name this machine, lest a
            web page reach the server under a name of its own (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, key: str | None, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, send)
        try:
            self._admit(scope)
            await self._app(scope, receive, exchange.send)
        except ApiError as error:
            await error_response(error, scope)(scope, receive, exchange.send)
        except ClientDisconnect:
            pass  # before all of its request was there
        except Exception:
            LOG.exception("request failed")
            if exchange.status is not None:
                raise  # the connection is closed, which tells that the answer is not whole
            await error_response(FAILURE, scope)(scope, receive, exchange.send)
        finally:
            self._record(exchange)

    def _admit(self, scope: Scope) -> None:
        if scope["path"] == OPEN:
            return
        headers = dict(scope["headers"])
        if self._key is None:
            host = headers.get(b"host", b"").decode("latin-1")
            if not THIS_MACHINE.fullmatch(host):
                raise ApiError(403, "without an API key this server answers to localhost alone; start it with a key")
            return
        given = _keys(headers.get(b"authorization", b""))
        if not any(hmac.compare_digest(key, self._key) for key in given):
            raise ApiError(401, "Incorrect API key provided: send Authorization: Bearer KEY", code="invalid_api_key")

    def _record(self, exchange: Exchange) -> None:
        fields = exchange.fields()
        self._metrics.requests.labels(exchange.route, str(exchange.status or GONE)).inc()
        if exchange.error is not None:
            self._metrics.errors.labels(exchange.error.type).inc()
        if not exchange.complete:
            self._metrics.disconnects.inc()
        LOG.info("request", extra={"fields": fields})


def _keys(authorization: bytes) -> Iterator[bytes]:
    """`Bearer KEY`, or as a browser has it: `Basic`, with the key as the password."""
    scheme, _, value = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        yield value.strip()
    if scheme.lower() == b"basic":
        try:
            yield base64.b64decode(value, validate=True).partition(b":")[2]
        except binascii.Error:
            return


class Exchange:
    """One request and its answer, as they go by.

    Attributes:
        status: of the answer; None: none was begun.
        complete: the answer was sent to its end.
    """

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self._started = perf_counter()
        self._id = f"req_{secrets.token_hex(12)}"
        self._notes: dict[str, Any] = {}
        scope.setdefault("state", {})["notes"] = self._notes
        self.status: int | None = None
        self.complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message["headers"], (b"x-request-id", self._id.encode())]}
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.complete = True

    @property
    def route(self) -> str:
        """As it is declared: what clients make up does not become a label."""
        return getattr(self._scope.get("route"), "path", "none")

    @property
    def error(self) -> ApiError | None:
        return self._notes.get("error")

    def fields(self) -> dict[str, Any]:
        """For the log; no text of the request or its answer."""
        fields = {
            "id": self._id,
            "method": self._scope["method"],
            "route": self.route,
            "status": self.status,
            "seconds": round(perf_counter() - self._started, 4),
            "complete": self.complete,
            **{name: value for name, value in self._notes.items() if name != "error"},
        }
        if self.error is not None:
            fields["error"] = self.error.code or self.error.type
        return fields


def note(scope: Scope, **notes: Any) -> None:
    """What the line of this request in the log is to say too."""
    scope["state"]["notes"].update(notes)


def error_response(error: ApiError, scope: Scope) -> JSONResponse:
    note(scope, error=error)
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    if error.status == 401:
        headers["www-authenticate"] = CHALLENGE
    return JSONResponse(error.body(), error.status, headers)
