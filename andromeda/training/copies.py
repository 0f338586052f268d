"""How a group that joins gets a copy of one that is there: over HTTP, as a safetensors file.

torchft's own transports send pickles, which could run code where they are read.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from http.client import HTTPConnection, HTTPException
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from andromeda.tensorfile import load_tensors, save_tensors

PAUSE = 0.05  # seconds between two questions for a copy
Copy = tuple[Mapping[str, Tensor], Mapping[str, str]]  # tensors, and texts to keep with them


class Copies:
    """Serves the newest copy of this group, and fetches those of others: torchft's `CheckpointTransport`.

    Args:
        host: by which others reach this machine.
    """

    def __init__(self, host: str) -> None:
        self._host, self._folder = host, tempfile.TemporaryDirectory(prefix="andromeda-")
        handler = partial(_Quiet, directory=self._folder.name)
        self._server = ThreadingHTTPServer(("", 0), handler)
        threading.Thread(target=self._server.serve_forever, name="copies", daemon=True).start()

    def metadata(self) -> str:
        return f"{self._host}:{self._server.server_port}"

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: dict[str, Any], timeout: timedelta) -> None:  # noqa: ARG002
        """Puts the copy where others fetch it; it stays until the next one."""
        tensors, texts = state_dict["user"]["default"]
        counts = {name: str(count) for name, count in state_dict["torchft"].items()}
        path = Path(self._folder.name)
        for old in path.iterdir():
            old.unlink()
        save_tensors(path / "writing", tensors, {**texts, **counts})
        (path / "writing").rename(path / str(step))

    def disallow_checkpoint(self) -> None:
        """The copy is a file, so weights may move while it is fetched."""

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> dict[str, Any]:  # noqa: ARG002
        """Waits for the copy, which the other may still be writing.

        Raises:
            OSError: it cannot be reached, or has none within the time.
            AndromedaError: what comes is damaged.
        """
        end = time.monotonic() + timeout.total_seconds()
        with tempfile.NamedTemporaryFile(prefix="andromeda-") as file:
            while not _fetch(metadata, f"/{step}", file, timeout.total_seconds()):
                if time.monotonic() > end:
                    raise OSError(f"{metadata}: has no copy of exchange {step}")
                time.sleep(PAUSE)
            tensors, texts = load_tensors(file.name)
        counts = {name: int(texts.pop(name)) for name in ("step", "batches_committed")}
        return {"user": {"default": (tensors, texts)}, "torchft": counts}

    def shutdown(self, wait: bool = True) -> None:  # noqa: ARG002
        self._server.shutdown()
        self._server.server_close()
        self._folder.cleanup()


def _fetch(address: str, path: str, file: IO[bytes], seconds: float) -> bool:
    """Whether there is such a file; then it is copied."""
    host, _, port = address.rpartition(":")
    connection = HTTPConnection(host, int(port), timeout=seconds)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        if response.status == 200:
            shutil.copyfileobj(response, file)
            file.flush()
        return response.status == 200
    except HTTPException as error:
        raise OSError(f"{address}: {error}") from error
    finally:
        connection.close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass
