"""Several engines behind one server, each in a process of its own, by Ray Serve.

The server stays what it is: its limits, its key, its log. What it asks of a `Service` goes to one of the replicas, by
preference to one that has read the beginning of the prompt before (Ray's PrefixCacheAffinityRouter). Ray starts a
replica that died anew, and replaces them one after the other when they are to be renewed.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError

from andromeda.inference.engine.request import Stats
from andromeda.serving.errors import ApiError
from andromeda.serving.jobs import Asked
from andromeda.serving.limits import Limits
from andromeda.serving.loading import open_service
from andromeda.serving.pieces import Count, Piece
from andromeda.serving.requests import ChatRequest, CompletionRequest

LOG = logging.getLogger(__name__)
APPLICATION = "andromeda"
ATTEMPTS = 5  # to find a replica that does not die before it has begun
OBJECT_STORE_BYTES = 100 * 2**20  # nothing large goes between the processes
IMBALANCE = 8  # requests that a replica may have more than another for the sake of its cache
TREE_CHARACTERS = 10_000_000  # of prompts that the router remembers
# By the module of the class itself: its public name, ray.serve.llm, imports vLLM (Ray 2.60).
ROUTER = "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router.PrefixCacheAffinityRouter"

Item = Piece | Count | ApiError


@dataclass(frozen=True)
class Prefix:
    """What the router looks at: the argument of a call that has a `prompt`."""

    prompt: str


class Replica:
    """One engine, in a process that Ray starts."""

    def __init__(self, directory: str, limits: Limits, generation: int) -> None:
        self._service, self._generation = open_service(directory, limits), generation

    async def answer(self, prefix: Prefix, chat: bool, body: str) -> AsyncIterator[Item]:
        """As of `Service.answer`; an error that the client is to hear of is the last item."""
        del prefix  # the router has read it
        asked = ChatRequest.model_validate_json(body) if chat else CompletionRequest.model_validate_json(body)
        try:
            async for piece in self._service.answer(asked):
                yield piece
        except ApiError as error:
            yield error

    def stats(self) -> Stats:
        """How its engine does."""
        return self._service.backend.stats()

    def check_health(self) -> None:
        """Raises where the engine has ended; then Ray replaces this replica."""
        if not self._service.alive:
            raise RuntimeError("the engine has ended")


class ReplicaService:
    """A `Service` of several replicas.

    Args:
        directory: as of `open_service`, on every machine.
        replicas: how many; each has its share of the processor's cores, and a GPU where there are any.
    """

    def __init__(self, directory: str, limits: Limits, replicas: int) -> None:
        self._directory, self._limits, self._replicas = directory, limits, replicas
        self._generation = 0
        self._handle: Any = None

    def deploy(self) -> None:
        """Starts the replicas, or renews them one after the other, each with the weights that are there now.

        Those that are left finish what they have begun. Returns once all are ready.

        Raises:
            RuntimeError: Ray cannot start them; its message says why.
        """
        self._generation += 1
        cores = max(1, (os.cpu_count() or 1) // self._replicas)
        router: Any = ROUTER
        deployment: Any = serve.deployment(
            Replica,
            name="Replica",
            num_replicas=self._replicas,
            max_ongoing_requests=self._limits.max_texts,
            ray_actor_options={"num_cpus": cores, "num_gpus": min(1, torch.cuda.device_count())},
            graceful_shutdown_timeout_s=self._limits.request_seconds,
            rolling_update_percentage=1 / self._replicas,
            request_router_config=RequestRouterConfig(
                request_router_class=router,
                request_router_kwargs={
                    "imbalanced_threshold": IMBALANCE,
                    "do_eviction": True,
                    "eviction_threshold_chars": TREE_CHARACTERS,
                    "eviction_target_chars": TREE_CHARACTERS * 9 // 10,
                },
            ),
        )
        application = deployment.bind(self._directory, self._limits, self._generation)
        self._handle = serve.run(application, name=APPLICATION, route_prefix=None)

    async def answer(self, asked: Asked) -> AsyncGenerator[Piece | Count, None]:
        """See `Service.answer`. What a replica leaves undone when it dies is given to another.

        But of a stream that has begun: its reader has seen a part, and gets an error.
        """
        for _ in range(ATTEMPTS):
            held: list[Piece | Count] = []
            begun = False
            try:
                async with aclosing(self._answer(asked)) as pieces:
                    async for piece in pieces:
                        if asked.stream:
                            begun = True
                            yield piece
                        else:
                            held.append(piece)
            except RayActorError as error:
                LOG.warning("a replica died: %s", type(error).__name__)
                if begun:
                    raise ApiError(500, "the process that wrote this died; ask again", code="replica_died") from error
            except DeploymentUnavailableError:
                break
            else:
                for piece in held:
                    yield piece
                return
        raise ApiError(503, "no replica is there; try again soon", code="no_replica", retry_after=10)

    async def _answer(self, asked: Asked) -> AsyncGenerator[Piece | Count, None]:
        assert self._handle is not None, "deployed"
        call = self._handle.options(stream=True, method_name="answer")
        items: Any = call.remote(Prefix(_beginning(asked)), isinstance(asked, ChatRequest), asked.model_dump_json())
        try:
            async for item in items:
                if isinstance(item, ApiError):
                    raise item
                yield item
        finally:
            items.cancel()

    alive = True  # Ray starts replicas that died anew

    async def close(self) -> None:
        """Ends the replicas, and what of Ray was started here."""
        await asyncio.to_thread(serve.delete, APPLICATION)
        await asyncio.to_thread(ray.shutdown)


def start_ray(replicas: int) -> None:
    """Joins the cluster at RAY_ADDRESS, or starts one on this machine. Its processes know each other by a token."""
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False, configure_logging=False)
    else:
        ray.init(
            num_cpus=max(replicas, os.cpu_count() or 1), include_dashboard=False, log_to_driver=False,
            configure_logging=False, object_store_memory=OBJECT_STORE_BYTES,
        )  # fmt: skip
    of_serve = logging.getLogger("ray.serve")  # which writes lines in a form of its own
    of_serve.handlers, of_serve.propagate = [], True
    serve.start(proxy_location="Disabled")


def _beginning(asked: Asked) -> str:
    """What prompts have in common when they begin alike."""
    if isinstance(asked, CompletionRequest):
        return str(asked.prompts[0])
    tools = "".join(tool.model_dump_json() for tool in asked.tools or ())
    return tools + "".join(f"{message.role}: {message.content}\n" for message in asked.messages)
