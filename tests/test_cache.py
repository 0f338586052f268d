"""The cache holds what it was given, grows without losing it, and forgets a pass that was broken off; token shift."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from andromeda.cache import Cache, next_shift_state, shift_tokens


def keys_and_values(tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, tokens, 3, 4), torch.randn(2, tokens, 3, 4)


class TestCache:
    @given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(1, 3))
    def test_growth_keeps_what_is_held(self, chunks: list[int], blocks: int) -> None:
        cache = Cache()
        whole = [keys_and_values(sum(chunks)) for _ in range(blocks)]
        for chunk in chunks:
            end = cache.length + chunk
            for block, (k, v) in enumerate(whole):
                got = cache.append(block, k[:, cache.length : end], v[:, cache.length : end])
                assert torch.equal(got[0], k[:, :end])
                assert torch.equal(got[1], v[:, :end])
            cache.advance(chunk)
        assert cache.length == sum(chunks)

    def test_growth_is_amortised(self) -> None:
        """A thousand tokens one at a time are moved some ten times, not a thousand."""
        cache, places = Cache(), set()
        for _ in range(1000):
            k, _ = cache.append(0, *keys_and_values(1))
            places.add(k.data_ptr())
            cache.advance(1)
        assert len(places) <= 12

    def test_a_prompt_takes_no_more_than_it_needs_in_whole_pages(self) -> None:
        cache = Cache()
        cache.append(0, *keys_and_values(100))
        cache.advance(100)
        assert cache.nbytes == 2 * 2 * 128 * 3 * 4 * 4

    def test_nbytes_counts_every_tensor(self) -> None:
        cache = Cache()
        assert cache.nbytes == 0
        for block in range(2):
            cache.append(block, torch.zeros(1, 8, 1, 4, dtype=torch.bfloat16), torch.zeros(1, 8, 1, 4))
        cache.set_shift_state(0, 0, torch.zeros(1, 2, 6))
        cache.advance(8)
        assert cache.nbytes == 2 * (64 * 4 * 2 + 64 * 4 * 4) + 2 * 6 * 4

    def test_what_was_not_committed_is_written_over(self) -> None:
        cache = Cache()
        first, lost, second = keys_and_values(5), keys_and_values(7), keys_and_values(2)
        cache.append(0, *first)
        cache.set_shift_state(0, 0, torch.ones(1, 1, 4))
        cache.advance(5)
        cache.append(0, *lost)
        cache.set_shift_state(0, 0, torch.full((1, 1, 4), 9.0))
        assert cache.length == 5
        state = cache.shift_state(0, 0)
        assert state is not None
        assert torch.equal(state, torch.ones(1, 1, 4))
        k, v = cache.append(0, *second)
        assert torch.equal(k, torch.cat([first[0], second[0]], 1))
        assert torch.equal(v, torch.cat([first[1], second[1]], 1))

    def test_blocks_and_slots_have_states_of_their_own(self) -> None:
        cache = Cache()
        assert cache.shift_state(0, 0) is None
        for block, slot in [(0, 0), (0, 1), (1, 0)]:
            cache.set_shift_state(block, slot, torch.tensor([[[10.0 * block + slot]]]))
        assert cache.shift_state(0, 0) is None
        cache.advance(1)
        states = [cache.shift_state(*at) for at in [(0, 0), (0, 1), (1, 0)]]
        assert [None if state is None else state.item() for state in states] == [0.0, 1.0, 10.0]
        assert cache.shift_state(1, 1) is None

    def test_copies_stand_next_to_their_row_and_go_their_own_ways(self) -> None:
        cache, (k, v) = Cache(), keys_and_values(3)
        cache.append(0, k, v)
        cache.set_shift_state(0, 0, torch.tensor([[[1.0]], [[2.0]]]))
        cache.advance(3)
        cache.expand(3)
        assert cache.length == 3
        state = cache.shift_state(0, 0)
        assert state is not None
        assert state.flatten().tolist() == [1, 1, 1, 2, 2, 2]
        new = torch.randn(6, 1, 3, 4), torch.randn(6, 1, 3, 4)
        keys, values = cache.append(0, *new)
        assert torch.equal(keys, torch.cat([k.repeat_interleave(3, 0), new[0]], 1))
        assert torch.equal(values, torch.cat([v.repeat_interleave(3, 0), new[1]], 1))


def naive_shift(x: Tensor, amount: int, before: Tensor | None, starts: Tensor | None) -> Tensor:
    """Channel by channel: out[b, t, c] = (before, x)[b, t - i, c] for a channel c of part i, 0 where there is none."""
    (batch, tokens, dim), out = x.shape, torch.zeros_like(x)
    width = dim // (amount + 1)
    for b in range(batch):
        for t in range(tokens):
            for c in range(dim):
                i = c // width if c < width * (amount + 1) else 0
                source = t - i
                if starts is not None and source < starts[b, t]:
                    continue
                if source >= 0:
                    out[b, t, c] = x[b, source, c]
                elif before is not None:
                    out[b, t, c] = before[b, amount + source, c]
    return out


@st.composite
def shifts(draw: st.DrawFn) -> tuple[Tensor, int]:
    amount, tokens = draw(st.integers(0, 4)), draw(st.integers(1, 9))
    dim = amount + 1 + draw(st.integers(0, 7))
    return torch.randn(2, tokens, dim), amount


class TestTokenShift:
    def test_by_hand(self) -> None:
        x = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]])
        assert shift_tokens(x, 1).tolist() == [[[1, 0, 3], [4, 2, 6], [7, 5, 9]]]
        assert shift_tokens(x, 2).tolist() == [[[1, 0, 0], [4, 2, 0], [7, 5, 3]]]
        assert shift_tokens(x, 0) is x

    @given(shifts(), st.booleans())
    def test_is_the_naive_loop(self, drawn: tuple[Tensor, int], continued: bool) -> None:
        x, amount = drawn
        before = torch.randn(2, amount, x.shape[2]) if continued else None
        assert torch.equal(shift_tokens(x, amount, before), naive_shift(x, amount, before, None))

    @given(shifts(), st.data())
    def test_nothing_crosses_a_documents_border(self, drawn: tuple[Tensor, int], data: st.DataObject) -> None:
        x, amount = drawn
        size = x.shape[0] * x.shape[1]
        border = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))).view(x.shape[:2])
        starts = torch.where(border, torch.arange(x.shape[1]), 0).cummax(1).values
        assert torch.equal(shift_tokens(x, amount, None, starts), naive_shift(x, amount, None, starts))

    @given(shifts(), st.data())
    def test_in_pieces_as_in_one(self, drawn: tuple[Tensor, int], data: st.DataObject) -> None:
        """Pieces shorter than the shift included."""
        x, amount = drawn
        pieces, state, done = [], None, 0
        while done < x.shape[1]:
            piece = x[:, done : done + data.draw(st.integers(1, x.shape[1] - done))]
            pieces.append(shift_tokens(piece, amount, state))
            state = next_shift_state(piece, amount, state)
            assert state.shape == (2, amount, x.shape[2])
            done += piece.shape[1]
        assert torch.equal(torch.cat(pieces, 1), shift_tokens(x, amount))

    def test_the_state_keeps_neither_the_graph_nor_the_input_alive(self) -> None:
        x = torch.randn(1, 1000, 4, requires_grad=True)
        for tokens in (1000, 1):
            state = next_shift_state(x[:, :tokens] * 1, 2, None)
            assert not state.requires_grad
            assert state.untyped_storage().nbytes() <= 3 * 4 * 4

    @pytest.mark.parametrize("amount", [1, 2, 3])
    def test_gradients(self, amount: int) -> None:
        x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
        starts = torch.tensor([[0, 0, 2, 2], [0, 1, 1, 1]])
        assert torch.autograd.gradcheck(lambda x: shift_tokens(x, amount, None, starts), (x,))
