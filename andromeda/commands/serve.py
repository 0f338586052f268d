"""`andromeda serve`: a model behind OpenAI's API."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from andromeda.commands.output import read_text
from andromeda.errors import AndromedaError

if TYPE_CHECKING:
    from andromeda.serving.limits import Limits
    from andromeda.serving.replicas import ReplicaService
    from andromeda.serving.service import LocalService
    from andromeda.serving.state import ServerState

LOG = logging.getLogger(__name__)
KEY_VARIABLE = "ANDROMEDA_API_KEY"
KEY = re.compile(r"[!-~]{8,}")  # what a header can hold


def serve(
    directory: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key_file: str | None = None,
    max_context_tokens: int = 131_072,
    max_output_tokens: int = 4096,
    max_texts: int = 256,
    request_seconds: float = 600.0,
    replicas: int = 1,
) -> None:
    """Serves a model to programs that speak OpenAI's API, and to a browser.

    Its log goes to stderr, a JSON object a line. SIGTERM or Ctrl-C ends it once what is begun is done, twice at once.
    An API key comes from the environment, ANDROMEDA_API_KEY, or from a file; then every route but /health asks for it.

    Args:
        directory: a model directory, or the directory of a training run.
        host: the address to listen at; any but this machine's own needs an API key.
        port: 0 takes a free one, which the log tells.
        name: by which clients ask for the model (default: that of the directory).
        api_key_file: a file that holds the key and nothing else.
        max_context_tokens: of a prompt and what is written after it; fewer where the cache holds no more.
        max_output_tokens: of one text, and what is written where a conversation sets no bound of its own.
        max_texts: that are written or wait at a time; more are told to come again.
        request_seconds: until a request ends with what is written by then.
        replicas: more than one: so many engines, each a process with its share of the cores or a GPU of its own, by Ray
            Serve; SIGHUP renews them one after the other, with the weights that are there then.
    """
    key = read_key(api_key_file)
    try:
        from andromeda.serving.app import create_app
        from andromeda.serving.limits import Limits
        from andromeda.serving.logs import log_to_stderr
        from andromeda.serving.server import is_loopback, listen, run_server
        from andromeda.serving.state import ServerState
    except ImportError as error:
        raise AndromedaError(f"serve: needs {error.name}; pip install 'andromeda-lm[serve]'") from error
    if replicas > 1 and find_spec("ray") is None:
        raise AndromedaError("serve: --replicas needs Ray; pip install 'andromeda-lm[ray]'")

    if key is None and not is_loopback(host):
        raise AndromedaError(
            f"serve: --host {host} can be reached from elsewhere: set {KEY_VARIABLE}, or --api-key-file"
        )
    limits = Limits(max_context_tokens, max_output_tokens, max_texts, request_seconds)
    state = ServerState(name or Path(directory).resolve().name, limits)
    listener = listen(host, port)
    log_to_stderr()
    load = partial(_load_replicas, replicas=replicas) if replicas > 1 else _load
    run_server(create_app(state, key), state, partial(load, directory, limits), listener)


async def _load(directory: str, limits: Limits, state: ServerState) -> None:
    """What is large is imported here, where the server answers already."""

    def opened() -> LocalService:
        from andromeda.serving.loading import open_service

        return open_service(directory, limits)

    service = await asyncio.to_thread(opened)
    state.metrics.watch_engine(service.backend.stats)
    state.service = service


async def _load_replicas(directory: str, limits: Limits, state: ServerState, replicas: int) -> None:
    def deployed() -> ReplicaService:
        os.environ["RAY_DISABLE_FAILURE_SIGNAL_HANDLER"] = "1"  # it would abort at SIGTERM
        from andromeda.serving.logs import log_to_stderr
        from andromeda.serving.replicas import ReplicaService, start_ray

        log_to_stderr()  # again, as Ray has set up what it logs
        start_ray(replicas)
        service = ReplicaService(directory, limits, replicas)
        service.deploy()
        return service

    service = await asyncio.to_thread(deployed)
    state.service = service
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: asyncio.create_task(_renew(service)))


async def _renew(service: ReplicaService) -> None:
    LOG.info("renewing")
    try:
        await asyncio.to_thread(service.deploy)
    except RuntimeError:
        LOG.exception("not renewed")
    else:
        LOG.info("renewed")


def read_key(path: str | None) -> str | None:
    """The API key, from the file or the environment; None: there is none.

    Raises:
        AndromedaError: both are given, or what is no key.
    """
    given = os.environ.get(KEY_VARIABLE)
    if path is not None and given is not None:
        raise AndromedaError(f"serve: give the API key by {KEY_VARIABLE} or --api-key-file, not both")
    key = given if path is None else read_text(path, path).strip()
    if key is not None and not KEY.fullmatch(key):
        source = KEY_VARIABLE if path is None else path
        raise AndromedaError(f"serve: {source} holds no API key: 8 or more printable ASCII characters without blanks")
    return key
