"""One text as it is written, against the same tokens read at once; and several, of which one ends before the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from hypothesis import given, settings
from hypothesis import strategies as st

from andromeda.inference.engine.request import Request, Stats, Token, Update
from andromeda.inference.text import TextStream
from andromeda.serving.limits import Limits
from andromeda.serving.pieces import Count, Piece
from andromeda.serving.requests import CompletionRequest
from andromeda.serving.service import LocalService
from andromeda.serving.writer import Writer
from andromeda.tokenizer import Tokenizer
from tests.serving.conftest import NAME, SENTENCES

TOKENIZER = Tokenizer.train([sentence * 3 for sentence in SENTENCES], vocab_size=320)
ids_of_text = st.lists(
    st.one_of(st.integers(0, 319), st.sampled_from(TOKENIZER.encode("the sea 🙂 日本"))), max_size=30
)
some_stops = st.lists(st.sampled_from(["the", "sea", "ea ", "🙂", "e", " s"]), max_size=3)


def in_updates(ids: list[int], sizes: list[int]) -> list[Update]:
    """As an engine gives them: several tokens at once where drafts were right, and the last says why it ended."""
    tokens = [Token(token, -float(place), ((token, -0.5),)) for place, token in enumerate(ids)]
    updates = []
    for size in sizes:
        updates.append(Update(tuple(tokens[:size])))
        tokens = tokens[size:]
    return [*updates, Update(tuple(tokens), "length")]


def written(writer: Writer, updates: list[Update]) -> list[Piece]:
    pieces = []
    for update in updates:
        pieces.append(writer.push(update))
        if writer.ended:
            break
    return pieces


@settings(max_examples=200)
@given(ids_of_text, some_stops, st.lists(st.integers(1, 5), max_size=12))
def test_pieces_joined_are_the_text(ids, stops, sizes):
    expected = TextStream(iter(ids), TOKENIZER, stops)
    text = "".join(expected)
    pieces = written(writer := Writer(0, TOKENIZER, stops, False), in_updates(ids, sizes))
    assert "".join(piece.text for piece in pieces) == text
    assert pieces[-1].finish_reason == writer.ended == expected.completion.finish_reason
    assert all(piece.finish_reason is None for piece in pieces[:-1])
    assert sum(piece.tokens for piece in pieces) == writer.tokens == len(expected.completion.ids)


@settings(max_examples=200)
@given(ids_of_text, some_stops, st.lists(st.integers(1, 5), max_size=12))
def test_logprobs_come_with_the_text_of_their_tokens(ids, stops, sizes):
    """Those of tokens that a stop string held back and swallowed never come."""
    pieces = written(Writer(0, TOKENIZER, stops, False), in_updates(ids, sizes))
    text, shown = "".join(piece.text for piece in pieces), ""
    entries = [entry for piece in pieces for entry in piece.logprobs]
    for piece in pieces:
        shown += piece.text
        assert all(entry.offset < max(len(shown), 1) or entry.offset == len(shown) for entry in piece.logprobs)
    assert all(entry.offset < len(text) for entry in entries if pieces[-1].finish_reason == "stop" and stops and text)
    assert [entry.token for entry in entries] == [TOKENIZER.token_bytes(token) for token in ids[: len(entries)]]
    if pieces[-1].finish_reason == "length":
        assert len(entries) == len(ids)


class Scripted:
    """A backend whose first text spells a stop string at once, and goes on like the second until it is closed.

    Attributes:
        closed: which texts, in order.
    """

    alive = True

    def __init__(self) -> None:
        self.closed: list[int] = []
        self._first = asyncio.Event()

    def check(self, request: Request) -> None: ...

    def stats(self) -> Stats:
        return Stats()

    async def close(self) -> None: ...

    async def stream(self, request: Request) -> AsyncIterator[Update]:
        number = (request.seed or 0) - 7
        try:
            yield Update(tuple(Token(token) for token in TOKENIZER.encode("the sea" if number == 0 else "日")))
            if number == 1:
                await self._first.wait()
                yield Update((Token(TOKENIZER.encode("本")[0]),), "length")
            await asyncio.sleep(3600)
        finally:
            self.closed.append(number)
            self._first.set()


def test_a_text_that_ends_is_closed_while_others_go_on():
    async def run() -> list[Piece | Count]:
        service = LocalService(backend, TOKENIZER, Limits())
        asked = CompletionRequest(model=NAME, prompt="a", n=2, seed=7, stop="sea")
        return [piece async for piece in service.answer(asked)]

    backend = Scripted()
    pieces = asyncio.run(asyncio.wait_for(run(), 30))
    assert backend.closed == [0, 1]
    ends = {piece.index: piece.finish_reason for piece in pieces if isinstance(piece, Piece) and piece.finish_reason}
    assert ends == {0: "stop", 1: "length"}
    assert isinstance(pieces[-1], Count)
