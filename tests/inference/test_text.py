"""Streamed text: whole characters, stop strings against str.find over the whole text, and why it ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from andromeda.config import AndromedaConfig
from andromeda.errors import AndromedaError
from andromeda.inference.generate import Context, generate
from andromeda.inference.sampling import GREEDY
from andromeda.inference.text import StopStrings, TextStream, chat_prompt, stream_text, text_prompt
from andromeda.model import Andromeda
from andromeda.tokenizer import Tokenizer

SENTENCES = ["The sea, the sea! Zoë said: 日本語 🙂 and\n", "naïve café — “the sea”\n\n"]
TOKENIZER = Tokenizer.train([sentence * 3 for sentence in SENTENCES], vocab_size=300)


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The definition: up to where the first stop string begins."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def in_pieces(text: str, sizes: list[int]) -> Iterator[str]:
    for size in sizes:
        yield text[:size]
        text = text[size:]
    yield text


few_letters = st.text(alphabet="aabbc🙂", max_size=24)
some_stops = st.lists(st.text(alphabet="aabbc🙂", min_size=1, max_size=5), max_size=4)


@given(few_letters, some_stops, st.lists(st.integers(0, 4)))
def test_stop_strings_cut_where_str_find_does_however_the_text_comes(text, stops, sizes):
    stop_strings = StopStrings(stops)
    shown = [stop_strings.push(piece) for piece in in_pieces(text, sizes)]
    shown.append(stop_strings.flush())
    assert "".join(shown) == cut_at_stop(text, stops)
    assert stop_strings.found == any(stop in text for stop in stops)
    assert stop_strings.push("a") == "" or not stop_strings.found


@given(few_letters, some_stops)
def test_shown_is_all_that_every_continuation_would_show(text, stops):
    """And the text ends as soon as all of them end at the same place."""
    rests = ["", *(stop[size:] for stop in stops for size in range(len(stop)))]
    stop_strings, shown = StopStrings(stops), ""
    for end in range(1, len(text) + 1):
        shown += stop_strings.push(text[end - 1])
        whole = [cut_at_stop(text[:end] + rest, stops) for rest in rests]
        assert shown == min(whole, key=len)
        assert stop_strings.found == (len(whole[0]) < end and len(set(whole)) == 1)
        if stop_strings.found:
            return


def test_an_empty_stop_string_is_refused():
    with pytest.raises(AndromedaError, match="stop string is empty"):
        StopStrings(["a", ""])


# ---- from ids to pieces ------------------------------------------------------------------------------

texts = st.text(alphabet=st.sampled_from([*"the sea\n,", "é", "日", "本", "🙂", "\u0301"]), max_size=30)


@given(texts, st.lists(texts.filter(bool).map(lambda text: text[:4]), max_size=3))
def test_pieces_are_whole_characters_up_to_the_stop(text, stops):
    ids = TOKENIZER.encode(text)
    stream = TextStream(iter(ids), TOKENIZER, stops)
    pieces = list(stream)
    assert "".join(pieces) == cut_at_stop(text, stops) == stream.completion.text
    assert all(pieces) and "\ufffd" not in "".join(pieces)
    assert stream.completion.finish_reason == ("stop" if any(stop in text for stop in stops) else "length")
    assert stream.completion.ids == tuple(ids[: stream.completion.completion_tokens])


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1), max_size=30))
def test_any_ids_give_the_text_that_decoding_gives(ids):
    """Broken UTF-8 too, which a model writes before it has learned better."""
    ended = next((place for place, token in enumerate(ids) if token in TOKENIZER.stop_ids), len(ids))
    stream = TextStream(iter(ids), TOKENIZER, [])
    assert "".join(stream) == TOKENIZER.decode(ids[:ended])
    assert stream.completion.ids == tuple(ids[: ended + 1])
    assert stream.completion.finish_reason == ("length" if ended == len(ids) else "stop")


def test_a_piece_comes_with_its_token():
    ids = TOKENIZER.encode("the sea the sea")
    given_out: list[int] = []

    def tokens() -> Iterator[int]:
        for token in ids:
            given_out.append(token)
            yield token

    stream = TextStream(tokens(), TOKENIZER, ["never"])
    assert next(stream) == TOKENIZER.decode(ids[:1]) and given_out == ids[:1]
    assert stream.completion.text == TOKENIZER.decode(ids[:1])


def test_no_token_is_asked_for_behind_a_stop():
    ids = TOKENIZER.encode("the sea")
    remaining = iter([*ids, *TOKENIZER.encode("🙂")])
    stream = TextStream(remaining, TOKENIZER, ["sea"])
    assert "".join(stream) == "the " and list(remaining) == TOKENIZER.encode("🙂")


# ---- with a model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Andromeda:
    """It hardly ever ends a text of itself."""
    torch.manual_seed(0)
    config = AndromedaConfig(
        num_tokens=TOKENIZER.vocab_size + 20,  # more than the tokenizer has
        max_seq_len=32, dim=24, depth=2, dim_head=8, heads=4, alibi_num_heads=2, tie_embeddings=False,
    )  # fmt: skip
    model = Andromeda(config)
    with torch.no_grad():
        model.to_logits.weight.mul_(100)[list(TOKENIZER.stop_ids)] = 0
    return model


def test_text_is_that_of_the_ids_that_generate_draws(model):
    prompt = text_prompt(TOKENIZER, "the sea")
    assert prompt == [TOKENIZER.eos_id, *TOKENIZER.encode("the sea")]
    stream = stream_text(model, TOKENIZER, "the sea", max_new_tokens=40, seed=3)
    text = "".join(stream)
    ids = list(
        generate(
            model, prompt, max_new_tokens=40, seed=3, stop_ids=TOKENIZER.stop_ids, vocab_size=TOKENIZER.vocab_size
        )
    )  # fmt: skip
    assert stream.completion.ids == tuple(ids)
    assert text == TOKENIZER.decode(ids) and len(text) > 10
    assert stream.completion.prompt_tokens == len(prompt) and stream.completion.completion_tokens == len(ids)


def test_a_stop_string_ends_what_the_model_writes(model):
    whole = "".join(stream_text(model, TOKENIZER, "", max_new_tokens=60, seed=1))
    stop = whole[20:23]
    stream = stream_text(model, TOKENIZER, "", max_new_tokens=60, seed=1, stop=["never", stop])
    assert "".join(stream) == whole[: whole.find(stop)]
    assert stream.completion.finish_reason == "stop" and stream.completion.completion_tokens < 60


def test_time_is_that_of_the_model_alone(monkeypatch):
    """Of a clock that goes on by itself when a token is drawn, and while the reader of the text is busy."""
    now = 0.0
    monkeypatch.setattr("andromeda.inference.text.perf_counter", lambda: now)

    def tokens() -> Iterator[int]:
        nonlocal now
        for seconds, token in zip((5.0, 0.5, 0.25, 0.25), TOKENIZER.encode("the sea the sea"), strict=False):
            now += seconds
            yield token

    stream = TextStream(tokens(), TOKENIZER, [])
    for _ in stream:
        now += 100
    done = stream.completion
    assert (done.prefill_seconds, done.decode_seconds, done.tokens_per_second) == (5.0, 1.0, 3.0)
    assert TextStream(iter([]), TOKENIZER, []).completion.tokens_per_second == 0


def test_a_context_is_told_as_cached_tokens(model):
    context, messages = Context(), [{"role": "user", "content": "the sea"}]
    prompt = chat_prompt(TOKENIZER, messages)
    first = stream_text(model, TOKENIZER, prompt, max_new_tokens=6, sampling=GREEDY, context=context)
    list(first)
    held = len(prompt) + first.completion.completion_tokens - 1
    second = stream_text(model, TOKENIZER, [*context.ids, 1], max_new_tokens=6, sampling=GREEDY, context=context)
    assert first.completion.cached_tokens == 0 and second.completion.cached_tokens == held
