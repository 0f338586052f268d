"""What a client is told when it gets no answer: a status, and OpenAI's error object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNION_TAGS = frozenset({"text", "parts", "choice", "named", "ids", "texts", "lists"})  # of `requests`, no fields
LONGEST = 500  # characters of a message
ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: of HTTP.
        message: one line that says what is wrong and what to do.
        param: the field of the request that is at fault, as `messages[0].content`.
        code: a word for programs.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        message = message if len(message) <= LONGEST else f"{message[:LONGEST]}..."  # it may quote the request
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        """Replicas send errors to the process that answers."""
        return _rebuilt, (self.status, self.message, self.param, self.code, self.retry_after)

    @property
    def type(self) -> str:
        """OpenAI's kind of error."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> dict[str, Any]:
        return {
            "error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        }  # fmt: skip


def _rebuilt(status: int, message: str, param: str | None, code: str | None, retry_after: int | None) -> ApiError:
    return ApiError(status, message, param=param, code=code, retry_after=retry_after)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def from_validation(errors: Sequence[Any]) -> ApiError:
    """The first of pydantic's errors, as OpenAI says it: an unknown field too is a 400."""
    error = errors[0]
    kind, param = error["type"], _param(error["loc"])
    if kind == "extra_forbidden":
        return bad_request(f"Unrecognized request argument supplied: {param}", param, "unknown_parameter")
    if kind == "missing":
        return bad_request(f"Missing required parameter: {param or 'a JSON object as the body'}", param)
    what = error["msg"].removeprefix("Value error, ")
    return bad_request(f"Invalid value for {param or 'the body'}: {what}", param, "invalid_value")


def _param(location: Sequence[str | int]) -> str | None:
    """`messages[0].content` of ("body", "messages", 0, "user", "content", "text")."""
    name, before = "", None
    for part in location[1:]:
        is_tag = part in UNION_TAGS or (isinstance(before, int) and part in ROLES)
        if isinstance(part, int):
            name += f"[{part}]"
        elif not is_tag:
            name += f".{part}" if name else part
        before = part
    return name or None
