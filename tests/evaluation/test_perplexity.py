"""Bits per byte against a loop by hand, and against what a uniform model must give."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from andromeda.config import AndromedaConfig
from andromeda.errors import AndromedaError
from andromeda.evaluation import perplexity
from andromeda.evaluation.perplexity import count_bytes, score_lengths, scored_tokens, window_losses
from andromeda.model import Andromeda
from andromeda.tokenizer import Tokenizer

CONFIG = AndromedaConfig(num_tokens=300, max_seq_len=8, dim=16, depth=2, dim_head=8, heads=2, alibi_num_heads=1)
END = 299
VERSE = "Tyger Tyger, burning bright, — « In the forests of the night » 漢字 🐯\n" * 4


@pytest.fixture(scope="module")
def model() -> Andromeda:
    torch.manual_seed(0)
    model = Andromeda(CONFIG)
    with torch.no_grad():  # far from uniform, so that a wrong token or context shows
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([VERSE], 300)


def random_text(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, END, (tokens,), generator=generator)
    return ids, torch.randint(1, 9, (tokens,), generator=generator)


def losses_by_hand(model: Andromeda, ids: Tensor, length: int) -> list[float]:
    """One forward pass for each token."""
    losses = []
    with torch.no_grad():
        for i, token in enumerate(ids.tolist()):
            before = [END, *ids[i - i % length : i].tolist()]
            losses.append(-model(torch.tensor([before]))[0, -1].log_softmax(-1)[token].item())
    return losses


@pytest.mark.parametrize("length", [1, 8, 20])
def test_losses_are_those_of_a_loop_by_hand(model: Andromeda, length: int) -> None:
    ids, _ = random_text(22)
    expected = torch.tensor(losses_by_hand(model, ids, length))
    torch.testing.assert_close(window_losses(model, ids, length, end_of_text=END), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("at_once", [1, 7, 24, 10**6])
def test_losses_do_not_depend_on_what_is_read_together(
    model: Andromeda, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, _ = random_text(50)
    expected = window_losses(model, ids, 8, end_of_text=END)
    monkeypatch.setattr(perplexity, "TOKENS_AT_ONCE", at_once)
    torch.testing.assert_close(window_losses(model, ids, 8, end_of_text=END), expected, atol=1e-5, rtol=1e-5)


def test_scores_are_sums_of_the_losses(model: Andromeda) -> None:
    ids, sizes = random_text(53)
    result = score_lengths(model, ids, sizes, [12, 4, 24, 4], end_of_text=END)
    assert [score.length for score in result.lengths] == [4, 12, 24]
    for score in result.lengths:
        expected = window_losses(model, ids[:48], score.length, end_of_text=END).tolist()
        assert (score.tokens, score.bytes) == (48, int(sizes[:48].sum()))
        assert score.nats_per_token == pytest.approx(sum(expected) / 48, rel=1e-5)
        assert score.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / int(sizes[:48].sum()), rel=1e-5)


def test_a_uniform_model_needs_log2_of_the_vocabulary_a_token() -> None:
    model = Andromeda(CONFIG)
    torch.nn.init.zeros_(model.output_weight)  # every logit is 0
    ids, sizes = random_text(100)
    result = score_lengths(model, ids, sizes, [5, 25, 50], end_of_text=END)
    for score in result.lengths:
        assert score.bits_per_byte == pytest.approx(math.log2(300) * 100 / int(sizes.sum()), rel=1e-6)
        assert score.nats_per_token == pytest.approx(math.log(300), rel=1e-6)
    for band in result.positions:
        for bits in band.bits_per_byte.values():
            assert bits == pytest.approx(math.log2(300) * band.tokens / band.bytes, rel=1e-6)


def test_positions_split_the_longest_windows(model: Andromeda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "FIRST_POSITIONS", 4)
    ids, sizes = random_text(70)
    result = score_lengths(model, ids, sizes, [7, 20], end_of_text=END)
    assert [(band.first, band.last) for band in result.positions] == [(0, 4), (4, 8), (8, 16), (16, 20)]
    for score in result.lengths:  # 60 tokens: the last of the windows of 7 has 4
        losses = window_losses(model, ids[:60], score.length, end_of_text=END).view(3, 20)
        for band in result.positions:
            here = slice(band.first, band.last)
            total = int(sizes[:60].view(3, 20)[:, here].sum())
            assert (band.tokens, band.bytes) == (3 * (band.last - band.first), total)
            bits = losses[:, here].sum().item() / math.log(2) / total
            assert band.bits_per_byte[score.length] == pytest.approx(bits, rel=1e-4)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(1, 500))
def test_all_lengths_score_the_same_tokens(lengths: list[int], tokens: int) -> None:
    if tokens < max(lengths):
        with pytest.raises(AndromedaError, match=f" {tokens} tokens?, fewer than the length {max(lengths)}"):
            scored_tokens(tokens, lengths)
        return
    scored = scored_tokens(tokens, lengths)
    assert scored % max(lengths) == 0
    assert tokens - max(lengths) < scored <= tokens
    for length in lengths:
        windows = list(perplexity._windows(torch.arange(scored), length))
        assert torch.equal(torch.cat([window.flatten() for window in windows]), torch.arange(scored))
        assert all(window.shape[1] == length for window in windows[:-1])


def test_progress_counts_every_token_and_the_mode_is_left_alone(model: Andromeda) -> None:
    ids, sizes = random_text(53)
    done: list[int] = []
    for training in (True, False):
        model.train(training)
        score_lengths(model, ids, sizes, [5, 10], end_of_text=END, progress=done.append)
        assert model.training is training
    assert sum(done) == 2 * 2 * 50


def test_weights_that_are_no_numbers_are_an_error() -> None:
    model = Andromeda(CONFIG)
    torch.nn.init.constant_(model.blocks[0].norm.weight, math.nan)
    with pytest.raises(AndromedaError, match="at 10 tokens the loss is no number"):
        score_lengths(model, *random_text(20), [5, 10], end_of_text=END)


def test_a_token_that_the_model_does_not_have_is_an_error(model: Andromeda) -> None:
    ids, sizes = random_text(20)
    with pytest.raises(AndromedaError, match="token id 300 is out of range for num_tokens=300"):
        score_lengths(model, ids.index_fill(0, torch.tensor([3]), 300), sizes, [10], end_of_text=END)
    with pytest.raises(AndromedaError, match="token id 4711 is out of range"):
        score_lengths(model, ids, sizes, [10], end_of_text=4711)


@pytest.mark.parametrize("lengths", [[], [0, 5], [-1]])
def test_a_length_below_one_is_an_error(model: Andromeda, lengths: list[int]) -> None:
    with pytest.raises(AndromedaError, match="at least 1 token"):
        score_lengths(model, *random_text(20), lengths, end_of_text=END)


# ---- bytes ---------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(text=st.text(min_size=1, max_size=60))
def test_bytes_of_the_tokens_are_those_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    counts = count_bytes(tokenizer, ids, text)
    assert sum(counts) == len(text.encode())
    if len(ids) == len(text.encode()):  # nothing merged: a token a byte
        assert set(counts) == {1}


def test_a_character_cut_in_two_is_counted_in_parts(tokenizer: Tokenizer) -> None:
    text = "a🦊b"  # no merge makes the fox
    ids = tokenizer.encode(text)
    assert len(ids) > 3
    for cut in range(len(ids) + 1):
        spelt = "".join(tokenizer.id_to_token(token) for token in ids[:cut])
        assert sum(count_bytes(tokenizer, ids, text)[:cut]) == len(spelt)


def test_bytes_of_a_vocabulary_that_is_not_byte_level(tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    pieces = ["<unk>", "</s>", "▁", "▁wörd", "s", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    spec = tokenizers.Tokenizer(
        models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True),
    )
    spec.pre_tokenizer = pre_tokenizers.Metaspace()
    spec.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = Tokenizer(spec.to_str())
    text = "wörd wörds é 漢 "
    counts = count_bytes(tokenizer, tokenizer.encode(text), text)
    assert sum(counts) == len(text.encode())

    spec.normalizer = normalizers.Lowercase()
    changing = Tokenizer(spec.to_str())
    kept, changed = "wörd", "WÖRDS ẞ"  # ẞ has three bytes, ß two
    assert sum(count_bytes(changing, changing.encode(kept), kept)) == len(kept.encode())
    with pytest.raises(AndromedaError, match="changes this text"):
        count_bytes(changing, changing.encode(changed), changed)
