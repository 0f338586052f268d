"""What every synthetic task is: parameters that check themselves, a way to draw a sample, and a check of an answer."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from andromeda.data.synthetic.draws import Draws
from andromeda.data.synthetic.split import SPLITS, Split, Unlucky, split_of
from andromeda.errors import AndromedaError

Form = Literal["text", "chat"]
FORMS: tuple[Form, ...] = get_args(Form)
Message = Mapping[str, Any]  # as `Tokenizer.encode_chat` takes them
Tool = Mapping[str, Any]

MOST_ATTEMPTS = 500  # an eighth of a large space is for testing, so that 500 misses are no accident


@dataclass(frozen=True)
class Text:
    """A document of plain text.

    Attributes:
        span: characters [begin, end) that count in the loss; before them stands the prompt, which does not end in
            blanks: those belong to the token behind them. What ends a document (end of text) counts too.
    """

    text: str
    span: tuple[int, int]

    @property
    def prompt(self) -> str:
        """What a model is given to continue."""
        return self.text[: self.span[0]]

    @property
    def completion(self) -> str:
        """What a model should answer."""
        return self.text[slice(*self.span)].strip()


@dataclass(frozen=True)
class Chat:
    """A conversation; all that the assistant says counts in the loss (`Tokenizer.encode_chat_with_mask`)."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What a model is given to reply to: everything before the last message."""
        return self.messages[:-1]


@dataclass(frozen=True)
class Draft:
    """What a task draws.

    Attributes:
        answer: what an answer is compared with, see the task's `check`.
        content: what the sample is about, in canonical form; each decides the split (`split_of`).
    """

    body: Text | Chat
    answer: str
    content: tuple[str, ...]


@dataclass(frozen=True)
class Sample(Draft):
    """Sample `number` of (task, split, seed)."""

    task: Task
    split: Split
    seed: int
    number: int


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A generated task; its fields are its parameters.

    Attributes:
        form: whether samples are plain text or conversations.
    """

    name: ClassVar[str]
    form: Form = "text"

    def __post_init__(self) -> None:
        self._require_one_of("form", FORMS)

    @abstractmethod
    def draw(self, draws: Draws, split: Split) -> Draft:
        """One sample, all of whose content is of the split. Raises Unlucky where the draws do not lead there."""

    def check(self, sample: Sample, text: str) -> bool:
        """Whether a text answers the sample: here, whether its first line that is not blank is the answer, `tidy`."""
        lines = [line for line in text.splitlines() if line.strip()]
        return bool(lines) and tidy(lines[0]) == tidy(sample.answer)

    @property
    def size(self) -> int:
        """Characters of a large sample, roughly, by which samples are put together for a worker."""
        return 1024

    def parameters(self) -> dict[str, Any]:
        """As a spec states them: without what is no plain value, such as a filler."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.metadata.get("plain", True)}

    # ---- for the tasks -----------------------------------------------------------------------------

    def _body(self, question: str, completion: str, lead: str = "\nAnswer:") -> Text | Chat:
        """Question and completion in the task's form; `lead` stands between them in plain text."""
        if self.form == "chat":
            asked = {"role": "user", "content": question}
            return Chat((asked, {"role": "assistant", "content": completion}))
        gap = "\n" if "\n" in completion else " "
        text = f"{question}{lead}{gap}{completion}"
        return Text(text, (len(question) + len(lead), len(text)))

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise AndromedaError(f"synthetic task {self.name}: {message}")

    def _require_one_of(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        self._require(value in choices, f"{name}={value!r} is unknown; use {', '.join(choices)}")

    def _require_whole(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        self._require(
            _is_whole(value) and least <= value <= most,
            f"{name}={value!r} must be a whole number from {least:,} to {most:,}",
        )

    def _require_range(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        good = isinstance(value, tuple) and len(value) == 2 and all(map(_is_whole, value))
        self._require(
            good and least <= value[0] <= value[1] <= most,
            f"{name}={value!r} must be two whole numbers, the least and the most, from {least:,} to {most:,}",
        )


def sample(task: Task, split: Split, seed: int, number: int) -> Sample:
    """Sample `number` >= 0, computed from (task, split, seed, number) alone: any order, any process, any machine.

    Raises:
        AndromedaError: an unknown split, a negative number, or parameters that leave nothing in the split.
    """
    if split not in SPLITS:
        raise AndromedaError(f"synthetic task {task.name}: split={split!r} is unknown; use {' or '.join(SPLITS)}")
    if number < 0:
        raise AndromedaError(f"synthetic task {task.name}: sample {number} does not exist; they count from 0")
    key = json.dumps([task.name, task.parameters(), split, seed, number])
    for attempt in range(MOST_ATTEMPTS):
        try:
            draft = task.draw(Draws(f"{key} {attempt}"), split)
        except Unlucky:
            continue
        if all(split_of(content) == split for content in draft.content):
            return Sample(draft.body, draft.answer, draft.content, task, split, seed, number)
    raise AndromedaError(
        f"synthetic task {task.name}: {MOST_ATTEMPTS} draws gave nothing for the {split} split, with "
        f"{task.parameters()}; choose parameters that allow for more"
    )


def check(sample: Sample, text: str) -> bool:
    """Whether a text answers the sample; what is normalised before, the task's own `check` says."""
    return sample.task.check(sample, text)


def tidy(text: str) -> str:
    """Text for comparison: runs of blanks as one, none at the ends, no full stop at the end. Case counts."""
    return " ".join(text.split()).removesuffix(".").rstrip()


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
