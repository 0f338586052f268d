"""The process: it listens while the model is loaded, and on SIGTERM finishes what it has begun."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from andromeda.errors import AndromedaError
from andromeda.serving.connection import protocol_of
from andromeda.serving.state import ServerState

LOG = logging.getLogger(__name__)
BACKLOG = 512  # connections that the kernel holds until they are accepted
KEEP_ALIVE_SECONDS = 30
OPEN_FILES = 256  # that are no connections, at most

Load = Callable[[ServerState], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        AndromedaError: the address cannot be had.
    """
    try:
        if not 0 <= port < 2**16:  # some systems take what is left of it
            raise OverflowError("a port lies between 0 and 65535")
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return socket.create_server(found[0][4][:2], family=found[0][0], backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise AndromedaError(f"serve: cannot listen at {host}, port {port}: {error}; choose another") from error


def run_server(app: ASGIApp, state: ServerState, load: Load, listener: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT asks it to stop: then it finishes what is begun; asked twice it ends at once.

    Args:
        load: gives the state its service; meanwhile requests get 503.

    Raises:
        AndromedaError: whatever `load` raises.
    """
    _allow_files(state.limits.max_connections + OPEN_FILES)
    config = uvicorn.Config(
        app, http=protocol_of(state.limits), ws="none", lifespan="off", log_config=None, access_log=False,
        server_header=False, proxy_headers=False, backlog=BACKLOG, timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, int(state.limits.client_seconds)),
    )  # fmt: skip
    asyncio.run(_Server(config, state, load).run_at(listener))


def _allow_files(number: int) -> None:
    """Each connection is an open file, of which systems allow few by default."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY not in (soft, hard) and soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(number, hard), hard))


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, state: ServerState, load: Load) -> None:
        super().__init__(config)
        self._state, self._load = state, load

    async def run_at(self, listener: socket.socket) -> None:
        host, port = listener.getsockname()[:2]
        LOG.info("listening", extra={"fields": {"host": host, "port": port}})
        loading = asyncio.create_task(self._load_model())
        await self.serve(sockets=[listener])
        if not loading.done():
            LOG.info("stopped while the model was loaded")
            os._exit(0)  # the thread that loads it cannot be stopped
        loading.result()
        if self._state.service is not None:
            await self._state.service.close()
        LOG.info("stopped")

    async def _load_model(self) -> None:
        try:
            await self._load(self._state)
        except BaseException:
            self.should_exit = True
            raise
        LOG.info("ready", extra={"fields": {"model": self._state.model}})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - as signal has it
        """In place of uvicorn's, which refuses connections at once and ends by the signal."""
        if self._state.draining:
            os._exit(128 + sig)  # asked twice; there is nothing to be saved
        self._state.draining = True

    async def on_tick(self, counter: int) -> bool:
        drained = self._state.draining and self._state.texts == 0
        return await super().on_tick(counter) or drained
