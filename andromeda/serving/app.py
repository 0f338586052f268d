"""The routes of OpenAI's API, and what a server says of itself."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from http import HTTPStatus
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException

from andromeda import __version__
from andromeda.serving.answer import EVENTS, Answer
from andromeda.serving.errors import ApiError, from_validation
from andromeda.serving.guard import Guard, error_response
from andromeda.serving.requests import ChatRequest, CompletionRequest
from andromeda.serving.responses import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    ErrorBody,
    Model,
    ModelList,
    Status,
)
from andromeda.serving.state import ServerState

PAGE_POLICY = "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
REFUSALS = (400, 401, 403, 404, 413, 429, 500, 503)


def create_app(state: ServerState, key: str | None = None) -> FastAPI:
    """The server's application.

    Args:
        state: its service may come later; until then requests get 503.
        key: that every route but /health asks for.
    """
    app = FastAPI(
        title="Andromeda",
        version=__version__,
        description="OpenAI's API in front of an Andromeda model.",
        responses={status: {"model": ErrorBody, "description": HTTPStatus(status).phrase} for status in REFUSALS},
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
    )
    app.router.route_class = _json_route(state.limits.max_body_bytes)
    app.add_middleware(Guard, key=key, metrics=state.metrics)
    _add_errors(app)
    _add_api(app, state)
    _add_status(app, state)
    return app


def _json_route(max_bytes: int) -> type[APIRoute]:
    """Routes whose bodies are bounded in size and depth (200), and are JSON alone: no NaN, no lone surrogates."""

    class JsonRequest(Request):
        async def body(self) -> bytes:
            if not hasattr(self, "_body"):
                self._body = await _read(self, max_bytes)
            return self._body

        async def json(self) -> Any:
            try:
                return from_json(await self.body(), allow_inf_nan=False)
            except ValueError as error:
                raise HTTPException(400, f"the body is not JSON: {error}") from error

    class JsonRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_json(request: Request) -> Response:
                request = JsonRequest(request.scope, request.receive)
                await request.body()  # here, where its error is not taken for one of parsing
                return await handle(request)

            return handle_json

    return JsonRoute


async def _read(request: Request, max_bytes: int) -> bytes:
    too_large = ApiError(413, f"the body has more than {max_bytes} bytes; send less", code="body_too_large")
    if int(request.headers.get("content-length", 0)) > max_bytes:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def _add_errors(app: FastAPI) -> None:
    """Whatever goes wrong has OpenAI's form."""

    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> Response:
        return error_response(error, request.scope)

    @app.exception_handler(RequestValidationError)
    async def _validation_error(request: Request, error: RequestValidationError) -> Response:
        return error_response(from_validation(error.errors()), request.scope)

    @app.exception_handler(HTTPException)
    async def _http_error(request: Request, error: HTTPException) -> Response:
        what = str(error.detail)
        if error.status_code == 404:
            what = f"there is no {request.method} {request.url.path}; see /openapi.json"
        response = error_response(ApiError(error.status_code, what), request.scope)
        response.headers.update(error.headers or {})
        return response


def _add_api(app: FastAPI, state: ServerState) -> None:
    @app.post("/v1/chat/completions", responses=_answers(ChatCompletion, ChatCompletionChunk))
    async def create_chat_completion(body: ChatRequest) -> Response:
        """The next message of a conversation: its text, or calls of tools."""
        return Answer(body, state.answer(body))

    @app.post("/v1/completions", responses=_answers(Completion, Completion))
    async def create_completion(body: CompletionRequest) -> Response:
        """What follows a text."""
        return Answer(body, state.answer(body))

    @app.get("/v1/models")
    async def list_models() -> ModelList:
        """The one model that is here."""
        return ModelList(data=[Model(id=state.model, created=state.created)])

    @app.get("/v1/models/{model:path}")
    async def retrieve_model(model: str) -> Model:
        """That it is here."""
        state.check_model(model)
        return Model(id=state.model, created=state.created)


def _answers(whole: type[Any], chunk: type[Any]) -> dict[int | str, dict[str, Any]]:
    """The documentation of an answer that is one object or a stream."""
    about = f"With stream=true each event is a {chunk.__name__}, and the last is [DONE]."
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    return {200: {"model": whole, "description": about, "content": {EVENTS: {"schema": event}}}}


def _add_status(app: FastAPI, state: ServerState) -> None:
    page = (resources.files("andromeda.serving") / "chat.html").read_text(encoding="utf-8")

    @app.get("/health")
    async def health() -> Status:
        """The process lives, and so does its engine."""
        state.check_alive()
        return Status(status="ok")

    @app.get("/ready")
    async def ready() -> Status:
        """It takes requests: the model is loaded, and it is not to stop."""
        state.check_ready()
        return Status(status="ready")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def chat_page() -> HTMLResponse:
        """A page to chat on."""
        return HTMLResponse(page, headers={"content-security-policy": PAGE_POLICY})

    @app.get("/metrics", response_class=Response, responses={200: {"content": {METRICS_TYPE: {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(state.metrics.text(), media_type=METRICS_TYPE)
