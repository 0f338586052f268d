"""What a server is doing: whether it takes requests, and how many texts it has in hand."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from time import monotonic, time

from andromeda.serving.errors import ApiError
from andromeda.serving.jobs import Asked
from andromeda.serving.limits import Limits
from andromeda.serving.metrics import Metrics
from andromeda.serving.pieces import Count, Piece, Service

LONGEST_RETRY = 60  # seconds that a client is asked to wait, at most


@dataclass
class ServerState:
    """Shared by all routes.

    Attributes:
        model: the name by which clients ask for it.
        service: what answers; None until the model is loaded.
        draining: takes no more requests, as it is to stop.
        texts: in hand, each of a request's choices counted.
    """

    model: str
    limits: Limits = field(default_factory=Limits)
    service: Service | None = None
    draining: bool = False
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time()))
    texts: int = 0
    _seconds: float = 1.0  # that a request takes, of late

    def check_alive(self) -> None:
        """Raises ApiError where only a new process could answer."""
        if self.service is not None and not self.service.alive:
            raise ApiError(503, "the engine has failed; its log says why", code="failed")

    def check_ready(self) -> Service:
        """What answers. Raises ApiError while starting or draining, or for good."""
        self.check_alive()
        if self.draining:
            raise ApiError(503, "the server is stopping; ask another one", code="stopping", retry_after=LONGEST_RETRY)
        if self.service is None:
            raise ApiError(503, "the model is being loaded; try again soon", code="starting", retry_after=5)
        return self.service

    async def answer(self, asked: Asked) -> AsyncGenerator[Piece | Count, None]:
        """The service's pieces, while there is room.

        Raises:
            ApiError: another model is asked for, there is no room, or whatever the service finds wrong.
        """
        service = self.check_ready()
        self.check_model(asked.model)
        self._check_room(asked.choices)
        started = monotonic()
        self._count(asked.choices)
        try:
            async with aclosing(self.metrics.watched(service.answer(asked))) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self._count(-asked.choices)
            self._seconds += 0.1 * (monotonic() - started - self._seconds)

    def check_model(self, name: str) -> None:
        """Raises ApiError for a model that is not here."""
        if name != self.model:
            raise ApiError(
                404, f"The model {name!r} does not exist; this server has {self.model!r}", param="model",
                code="model_not_found",
            )  # fmt: skip

    def _check_room(self, texts: int) -> None:
        room = self.limits.max_texts
        if texts > room:
            raise ApiError(400, f"{texts} texts were asked for; this server writes {room} at once at most", param="n")
        if self.texts + texts > room:
            wait = min(max(math.ceil(self._seconds), 1), LONGEST_RETRY)
            raise ApiError(
                429, f"{self.texts} texts are being written or wait; try again later", code="queue_full",
                retry_after=wait,
            )  # fmt: skip

    def _count(self, texts: int) -> None:
        self.texts += texts
        self.metrics.texts.set(self.texts)
