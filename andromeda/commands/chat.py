"""`andromeda chat`: a conversation in the terminal."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from andromeda.commands.generate import describe_speed
from andromeda.commands.output import decode, plain_console
from andromeda.errors import AndromedaError

if TYPE_CHECKING:
    from rich.console import Console

    from andromeda.inference.sampling import Sampling
    from andromeda.inference.text import Completion
    from andromeda.model import Andromeda
    from andromeda.tokenizer import Tokenizer

COMMANDS = "/reset forgets the conversation, /exit ends it, Ctrl-C cuts an answer short."


def chat(
    directory: str,
    *,
    system: str | None = None,
    max_new_tokens: int = 1024,
    seed: int | None = None,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.05,
    repetition_penalty: float = 1.0,
) -> None:
    """Talks with a model in the terminal.

    Each line is a message. /reset forgets the conversation, /exit or the end of the input ends it, Ctrl-C cuts an
    answer short.

    Args:
        directory: a model directory, or the directory of a training run; its tokenizer needs a chat template.
        system: instructions that stand before the conversation.
        max_new_tokens: tokens an answer has at most.
        seed: of the draws, for the same answers again (default: another one each time).
        temperature: 0 takes the most probable token each time; 1 draws from the model's own distribution.
        top_k: draw among the k most probable tokens alone; 0 means all.
        top_p: draw among the most probable tokens that together have this probability.
        min_p: draw among tokens at least this many times as probable as the most probable one.
        repetition_penalty: above 1, words that occurred become less probable.
    """
    from andromeda.inference.loading import load_model
    from andromeda.inference.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    model, tokenizer = load_model(directory)
    seed = secrets.randbelow(2**32) if seed is None else seed
    conversation = Conversation(model, tokenizer, sampling, max_new_tokens, seed, system)
    console = plain_console()
    interactive = sys.stdin.isatty()
    if interactive:
        console.print(COMMANDS, style="dim")
    for line in _lines(interactive):
        if line == "/exit":
            return
        if line == "/reset":
            conversation.reset()
        elif line.startswith("/"):
            console.print(COMMANDS, style="dim")
        elif line:
            _answer(conversation, line, console, interactive)


def _lines(interactive: bool) -> Iterator[str]:
    """What is typed, or comes through a pipe, up to its end."""
    if not interactive:
        for number, line in enumerate(sys.stdin.buffer, start=1):
            yield decode(line, f"standard input, line {number}").strip()
        return
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  input() has editing and a history with it
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise AndromedaError(f"standard input: is not UTF-8 text (byte {error.start}); convert it") from error


def _answer(conversation: Conversation, line: str, console: Console, interactive: bool) -> None:
    def show(piece: str) -> None:
        console.out(piece, end="", highlight=False)

    try:
        completion = conversation.answer(line, show)
    finally:
        console.print()
    if interactive and completion.ids:
        console.print(describe_speed(conversation.model, completion), style="dim", soft_wrap=True)


class Conversation:
    """Messages, and the cache of what the model read of them.

    The next prompt is the whole conversation, of which only what the cache does not hold is read.
    """

    def __init__(
        self,
        model: Andromeda,
        tokenizer: Tokenizer,
        sampling: Sampling,
        max_new_tokens: int,
        seed: int,
        system: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.max_new_tokens, self.seed, self.system = max_new_tokens, seed, system
        self.reset()

    def reset(self) -> None:
        """Back to the system message alone."""
        from andromeda.inference.generate import Context

        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.context = Context()
        self._prompt: list[int] = []  # the last one, as the tokenizer spells it
        self._prompt_tokens = 0  # that stand for it in the context

    def answer(self, text: str, show: Callable[[str], None]) -> Completion:
        """Adds a message and the model's answer to it, which is shown piece by piece, until Ctrl-C at most."""
        from andromeda.inference.text import chat_prompt, stream_text

        self.messages.append({"role": "user", "content": text})
        prompt = chat_prompt(self.tokenizer, self.messages)
        ids = self._spelt_as_drawn(prompt)
        self._prompt, self._prompt_tokens = prompt, len(ids)
        stream = stream_text(
            self.model, self.tokenizer, ids, max_new_tokens=self.max_new_tokens, sampling=self.sampling,
            seed=self.seed + len(self.messages), context=self.context,
        )  # fmt: skip
        with suppress(KeyboardInterrupt):
            for piece in stream:
                show(piece)
        self.messages.append({"role": "assistant", "content": stream.completion.text})
        return stream.completion

    def _spelt_as_drawn(self, prompt: list[int]) -> list[int]:
        """The prompt with all answers in the tokens that the model drew, as the context holds them.

        They need not be those that the tokenizer cuts the same text into.
        """
        stop_ids, before = self.tokenizer.stop_ids, len(self._prompt)
        drawn = self.context.ids[self._prompt_tokens :]
        if drawn and drawn[-1] in stop_ids:
            drawn = drawn[:-1]
        end = next((place for place in range(before, len(prompt)) if prompt[place] in stop_ids), len(prompt))
        if prompt[:before] != self._prompt or self._spelling(prompt[before:end]) != self._spelling(drawn):
            return prompt
        return self.context.ids[: self._prompt_tokens] + drawn + prompt[end:]

    def _spelling(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special=False)
