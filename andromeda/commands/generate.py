"""`andromeda generate`: continues a prompt."""

from __future__ import annotations

import json as jsonlib
import secrets
import sys
from typing import TYPE_CHECKING, Any

from andromeda.commands.output import decode, plural, read_text
from andromeda.errors import AndromedaError

if TYPE_CHECKING:
    from andromeda.inference.text import Completion, TextStream
    from andromeda.model import Andromeda


def generate(
    directory: str,
    *,
    prompt: str | None = None,
    prompt_file: str | None = None,
    max_new_tokens: int = 256,
    seed: int | None = None,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.05,
    repetition_penalty: float = 1.0,
    stop: list[str] | None = None,
    json: bool = False,
) -> None:
    """Continues a prompt with a model's own words.

    Prints the prompt and what follows it as it is written; at the end, to stderr, how fast that went.

    Args:
        directory: a model directory, or the directory of a training run.
        prompt: the text to continue; - reads it from standard input, and an empty one begins from nothing.
        prompt_file: a UTF-8 file with the text to continue, in place of --prompt.
        max_new_tokens: tokens to write at most.
        seed: of the draws, for the same text again (default: another one each time, told at the end).
        temperature: 0 takes the most probable token each time; 1 draws from the model's own distribution.
        top_k: draw among the k most probable tokens alone; 0 means all.
        top_p: draw among the most probable tokens that together have this probability.
        min_p: draw among tokens at least this many times as probable as the most probable one.
        repetition_penalty: above 1, words that occurred become less probable.
        stop: text at which to stop, not printed; may be given several times.
        json: print one JSON object at the end in place of the text.
    """
    text = read_prompt(prompt, prompt_file)

    from andromeda.inference.loading import load_model
    from andromeda.inference.sampling import Sampling
    from andromeda.inference.text import stream_text

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    seed = secrets.randbelow(2**32) if seed is None else seed
    model, tokenizer = load_model(directory)
    stream = stream_text(
        model, tokenizer, text, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop or (), seed=seed
    )
    try:
        if json:
            _write_json(stream, text, seed)
        else:
            _write_text(stream, text)
    finally:  # after Ctrl-C too
        if stream.completion.ids:
            print(f"{describe_speed(model, stream.completion)}, seed {seed}", file=sys.stderr)


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt, as it was given, from wherever it is.

    Raises:
        AndromedaError: both or none given, a file that cannot be read, or not text.
    """
    if (prompt is None) == (prompt_file is None):
        raise AndromedaError("generate: give either --prompt TEXT (- for standard input) or --prompt-file FILE")
    if prompt_file is not None:
        return read_text(prompt_file, prompt_file)
    if prompt != "-":
        return str(prompt)
    return decode(sys.stdin.buffer.read(), "standard input")  # as text, Python may let bytes through that are none


def describe_speed(model: Andromeda, completion: Completion) -> str:
    """One line: tokens a second, and the bytes read a second beside what a plain copy moves here."""
    from andromeda.inference.speed import bytes_per_token, memory_bandwidth

    tokens = plural(completion.prompt_tokens - completion.cached_tokens, "token")
    read = f"{tokens} read in {completion.prefill_seconds:.2f} s"
    rate = completion.tokens_per_second
    if rate == 0:
        return f"{read}, {completion.completion_tokens} written"
    context = completion.prompt_tokens + completion.completion_tokens // 2
    achieved = rate * bytes_per_token(model, context)
    possible = memory_bandwidth(model.output_weight.device)
    return (
        f"{read}, {completion.completion_tokens} written at {rate:.1f} tokens/s "
        f"({achieved / 1e9:.1f} GB/s; memory here: {possible / 1e9:.1f})"
    )


def _write_text(stream: TextStream, prompt: str) -> None:
    try:
        print(prompt, end="", flush=True)
        for piece in stream:
            print(piece, end="", flush=True)
    finally:
        print(flush=True)


def _write_json(stream: TextStream, prompt: str, seed: int) -> None:
    for _ in stream:
        pass
    print(jsonlib.dumps(_as_json(stream.completion, prompt, seed), ensure_ascii=False, indent=2))


def _as_json(completion: Completion, prompt: str, seed: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "seed": seed,
        "usage": {
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion.completion_tokens,
            "total_tokens": completion.prompt_tokens + completion.completion_tokens,
        },
        "prefill_seconds": completion.prefill_seconds,
        "tokens_per_second": completion.tokens_per_second,
    }
