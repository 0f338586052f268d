"""What may be asked: the bodies of /v1/chat/completions and /v1/completions.

Types are strict, as JSON's are. A field that OpenAI does not know is an error, as it is there; fields that it knows
and that change nothing here are taken and ignored; those that would change the answer are refused.
Source: OpenAI's API reference, https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

MAX_CHOICES = 128  # OpenAI's bounds, from here on
MAX_TOOLS = 128
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 1024  # ours: what is held back to look for one is at most so long
MAX_PROMPTS = 2048
MAX_BIASES = 1024


class _Body(BaseModel):
    """`allow_inf_nan`: JSON has neither."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Part(BaseModel):
    """A part of a request: what clients add to it, such as thoughts that a server sent, is left unread."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


# ---- messages ------------------------------------------------------------------------------------


class TextPart(_Part):
    type: Literal["text"] = Field(description="Text is all that the model reads.")
    text: str


def _kind_of_content(value: Any) -> str:
    return "parts" if isinstance(value, list) else "text"


Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextPart], Field(fail_fast=True), Tag("parts")],
    Discriminator(_kind_of_content),
]


class SystemMessage(_Part):
    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(_Part):
    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(_Part):
    name: str
    arguments: str = Field(description="A JSON object, as the model wrote it.")


class ToolCallMessage(_Part):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(_Part):
    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCallMessage], Field(fail_fast=True)] | None = None


class ToolMessage(_Part):
    role: Literal["tool"]
    content: Content
    tool_call_id: str


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


# ---- tools and forms -----------------------------------------------------------------------------

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Function(_Part):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="A JSON schema; none: no parameters.")
    strict: bool | None = Field(default=None, description="Arguments keep to the schema in any case.")


class Tool(_Part):
    type: Literal["function"]
    function: Function


class NamedFunction(_Part):
    name: str


class NamedTool(_Part):
    type: Literal["function"]
    function: NamedFunction


def _kind_of_choice(value: Any) -> str:
    return "named" if isinstance(value, dict | NamedTool) else "choice"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("choice")] | Annotated[NamedTool, Tag("named")],
    Discriminator(_kind_of_choice),
]


class TextFormat(_Part):
    type: Literal["text"]


class JsonObjectFormat(_Part):
    type: Literal["json_object"]


class JsonSchema(_Part):
    model_config = ConfigDict(serialize_by_alias=True)  # a request goes to replicas in its own form

    name: Name
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema", description="A JSON schema; the answer keeps to it.")
    strict: bool | None = None


class JsonSchemaFormat(_Part):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


# ---- what both have ------------------------------------------------------------------------------


class StreamOptions(_Part):
    include_usage: bool = False
    include_obfuscation: bool | None = Field(default=None, description="Without effect.")


def _kind_of_stop(value: Any) -> str:
    return "texts" if isinstance(value, list) else "text"


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Stop = Annotated[
    Annotated[StopString, Tag("text")]
    | Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_STOPS), Tag("texts")],
    Discriminator(_kind_of_stop),
]
TokenId = Annotated[str, Field(pattern=r"^\d{1,9}$")]


class _Asked(_Body):
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63, description="Choice i has seed + i.")
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=2**31, description="Not OpenAI's, as vLLM has it; 0 keeps all.")
    min_p: float | None = Field(default=None, ge=0, le=1, description="Not OpenAI's, as vLLM has it.")
    repetition_penalty: float | None = Field(
        default=None, ge=0.1, le=10, description="Not OpenAI's, as vLLM has it; over the prompt too."
    )
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        default=None, max_length=MAX_BIASES, description="Token ids, as text."
    )
    stop: Stop | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    user: str | None = Field(default=None, description="Without effect.")

    refused: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, reason in cls.refused.items():
                if data.get(name) not in (None, False):
                    raise ValueError(f"{name} is not supported: {reason}")
        return data

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream=true alone")
        return self

    @property
    def choices(self) -> int:
        """Texts that are to be written."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


Unused = Annotated[Any, Field(description="Without effect.")]


class ChatRequest(_Asked):
    """A conversation whose next message the model is to write."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    metadata: Unused = None
    modalities: list[Literal["text"]] | None = Field(default=None, description="Text alone.")
    prediction: Unused = None
    prompt_cache_key: Unused = None
    prompt_cache_options: Unused = None
    prompt_cache_retention: Unused = None
    reasoning_effort: Unused = None
    safety_identifier: Unused = None
    service_tier: Unused = None
    store: Unused = None
    verbosity: Unused = None
    audio: None = Field(default=None, description="Refused.")
    function_call: None = Field(default=None, description="Refused.")
    functions: None = Field(default=None, description="Refused.")
    moderation: None = Field(default=None, description="Refused.")
    web_search_options: None = Field(default=None, description="Refused.")

    refused: ClassVar[dict[str, str]] = {
        "audio": "the model writes text alone",
        "function_call": "use tool_choice",
        "functions": "use tools",
        "moderation": "this server has no such model",
        "web_search_options": "this server does not search",
    }

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise ValueError("give max_completion_tokens or max_tokens, not both")
        self._check_tools()
        return self

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        if not names and self.tool_choice not in (None, "none"):
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not among the tools")

    @property
    def calls_tools(self) -> bool:
        """Whether the answer may hold calls."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


def _kind_of_prompt(value: Any) -> str:
    first = value[0] if isinstance(value, list) and value else None
    if not isinstance(value, list):
        return "text"
    return "texts" if isinstance(first, str) else "lists" if isinstance(first, list) else "ids"


Id = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Id], Field(fail_fast=True, min_length=1)]
Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS), Tag("texts")]
    | Annotated[Ids, Tag("ids")]
    | Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS), Tag("lists")],
    Discriminator(_kind_of_prompt),
]


class CompletionRequest(_Asked):
    """A text, or several, to be continued; token ids are taken as they are, nothing is put before them."""

    prompt: Prompt = ""
    logprobs: int | None = Field(default=None, ge=0, le=5)
    best_of: int | None = Field(default=None, ge=1, le=20, description="Refused where it is not n.")
    echo: bool | None = Field(default=None, description="Refused.")
    suffix: None = Field(default=None, description="Refused.")

    refused: ClassVar[dict[str, str]] = {
        "echo": "the answer is what was written; put the prompt before it yourself",
        "suffix": "the model writes forwards alone",
    }

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of is not supported: ask for n choices and choose among them")
        if self.choices > MAX_PROMPTS:
            raise ValueError(f"prompts times n are {self.choices} texts, {MAX_PROMPTS} at most are written at once")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    @property
    def choices(self) -> int:
        return len(self.prompts) * (self.n or 1)

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens or 16  # OpenAI's default
