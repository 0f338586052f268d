"""Full forward == generate with and without cache, however the prompt is read (the pass itself: test_model.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from andromeda.config import AndromedaConfig
from andromeda.errors import AndromedaError
from andromeda.inference.generate import Context, default_prefill_chunk, generate, generate_batch
from andromeda.inference.sampling import GREEDY, Sampling
from andromeda.model import Andromeda

TINY = AndromedaConfig(
    num_tokens=61,
    max_seq_len=32,
    dim=24,
    depth=2,
    dim_head=8,
    heads=4,
    alibi_num_heads=3,
    window_epsilon=0.3,
    tie_embeddings=False,
)
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "pre-norm": {"deepnorm": False},
    "sequential": {"parallel_blocks": False},
    "sequential pre-norm": {"parallel_blocks": False, "deepnorm": False, "ff_activation": "gelu"},
    "shift 0": {"shift_tokens": 0},
    "shift 2": {"shift_tokens": 2, "parallel_blocks": False},
    "shift 3": {"shift_tokens": 3, "deepnorm": False},
    "multi-head": {"attn_one_kv_head": False},
    "rotary on all": {"rotary_heads": "all"},
    "rotary on none": {"rotary_heads": "none", "rotary_xpos": False},
    "plain rotary, multi-head": {"rotary_heads": "all", "rotary_xpos": False, "attn_one_kv_head": False},
    "interpolated": {"position_interpolation": 4.0},
    "no ALiBi": {"alibi_pos_bias": False},
    "no QK norm": {"qk_norm": False, "attn_qk_norm": False, "attn_qk_norm_dim_scale": False},
    "absolute positions": {"use_abs_pos_emb": True, "max_seq_len": 100},
    "no log-n": {"log_n_temperature": False},
    "no windows": {"window_epsilon": 0.0},
    "dense reference": {"attn_flash": False},
    "tied": {"tie_embeddings": True},
}
LENGTH = 90  # beyond max_seq_len, so log-n is at work, and beyond two of the three windows


def build(dtype: torch.dtype = torch.float32, **changes: Any) -> Andromeda:
    """Random gains, so that a confusion of heads or channels shows, and attention that weighs much in the output."""
    torch.manual_seed(0)
    model = Andromeda(replace(TINY, **changes)).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("_gain"):
            torch.nn.init.uniform_(parameter, 0.3, 0.5)
        elif name.endswith("to_out.weight"):
            torch.nn.init.normal_(parameter)
    return model


def some_ids(length: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, TINY.num_tokens, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def lengths_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[Andromeda], list[int]]:
    """Watches a model: how many tokens each pass over it reads."""

    def watch(model: Andromeda) -> list[int]:
        hidden, lengths = model.hidden, []

        def watched(ids: torch.Tensor, **rest: Any) -> torch.Tensor:
            lengths.append(ids.shape[1])
            return hidden(ids, **rest)

        monkeypatch.setattr(model, "hidden", watched)
        return lengths

    return watch


def test_the_windows_of_the_tests_are_active():
    block: Any = build().blocks[0]
    windows = sorted(block.attention.windows().tolist())
    assert windows[0] < 29 < windows[1] < LENGTH < windows[2]


@pytest.mark.parametrize("name", CONFIGS)
def test_generate_is_the_same_with_and_without_cache(name):
    """Also as the greedy loop over full forwards, written out."""
    model, prompt = build(**CONFIGS[name]), some_ids(29)[0].tolist()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(24):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    ways: list[dict[str, Any]] = [{}, {"prefill_chunk": 1}, {"prefill_chunk": 10}, {"use_cache": False}]
    for way in ways:
        assert list(generate(model, prompt, max_new_tokens=24, sampling=GREEDY, **way)) == ids[29:], way


@settings(max_examples=15)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**40), st.sampled_from(sorted(CONFIGS)))
def test_the_same_seed_writes_the_same_however_it_is_read(length, chunk, seed, name):
    model, prompt = build(torch.float64, **CONFIGS[name]), some_ids(length, seed=seed % 7)[0].tolist()
    sampling = Sampling(temperature=1.3, top_k=40, top_p=0.95, repetition_penalty=1.2)
    first = list(generate(model, prompt, max_new_tokens=12, sampling=sampling, seed=seed, prefill_chunk=chunk))
    second = list(generate(model, prompt, max_new_tokens=12, sampling=sampling, seed=seed, use_cache=False))
    assert first == second and len(first) == 12


def test_other_seeds_write_otherwise():
    model = build()
    texts = {tuple(generate(model, [1, 2], max_new_tokens=20, seed=seed)) for seed in range(5)}
    assert len(texts) == 5


def test_the_repetition_penalty_sees_the_prompt_and_what_was_written(monkeypatch):
    model = build()
    monkeypatch.setattr(model, "logits", lambda hidden: torch.ones(1, TINY.num_tokens))  # ties go to the lowest id
    drawn = list(generate(model, [0, 1, 3], max_new_tokens=4, sampling=replace(GREEDY, repetition_penalty=2.0)))
    assert drawn == [2, 4, 5, 6]


def test_a_stop_id_is_the_last_token():
    model = build()
    plain = list(generate(model, [5], max_new_tokens=30, seed=3))
    stop = plain[10]
    stopped = list(generate(model, [5], max_new_tokens=30, seed=3, stop_ids={stop}))
    assert stopped == plain[: plain.index(stop) + 1]


def test_ids_beyond_the_vocabulary_are_never_drawn():
    drawn = list(generate(build(), [1], max_new_tokens=60, sampling=Sampling(temperature=50), seed=0, vocab_size=7))
    assert set(drawn) == set(range(7))


def test_no_tokens_asked_for_reads_nothing(monkeypatch):
    model = build()
    monkeypatch.setattr(model, "hidden", None)
    assert list(generate(model, [1], max_new_tokens=0)) == []


def test_each_token_is_read_once_and_the_last_not_at_all(lengths_read):
    model = build()
    read = lengths_read(model)
    assert len(list(generate(model, [1] * 10, max_new_tokens=4, prefill_chunk=4))) == 4
    assert read == [4, 4, 2, 1, 1, 1]


def test_the_caller_is_left_with_gradients_on():
    stream = generate(build(), [1, 2], max_new_tokens=3)
    next(stream)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_learned_positions_end_the_text():
    model = build(use_abs_pos_emb=True, max_seq_len=20)
    assert len(list(generate(model, [1] * 15, max_new_tokens=100))) == 6  # the last one has no position of its own
    with pytest.raises(AndromedaError, match="21 tokens, but with use_abs_pos_emb=True max_seq_len=20"):
        generate(model, [1] * 21)


# ---- a context, kept --------------------------------------------------------------------------------


def test_a_prompt_that_goes_on_is_read_from_where_the_context_ends(lengths_read):
    model, context = build(), Context()
    answer = list(generate(model, [1, 2, 3], max_new_tokens=5, sampling=GREEDY, context=context))
    prompt = [1, 2, 3, *answer, 4, 5]
    expected = list(generate(model, prompt, max_new_tokens=5, sampling=GREEDY))
    read = lengths_read(model)
    assert list(generate(model, prompt, max_new_tokens=5, sampling=GREEDY, context=context)) == expected
    assert read[0] == 3  # the last token drawn, and the two new ones


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(-4, 4), st.lists(st.integers(0, 3), min_size=1, max_size=8)), max_size=4))
def test_a_context_changes_no_text(turns):
    """Whatever is kept of what was written before, and whatever follows."""
    model, context, ids = build(torch.float64), Context(), [1]
    for change, new in turns:
        prompt = [*ids[: change or None], *new]
        drawn = list(generate(model, prompt, max_new_tokens=4, sampling=GREEDY, context=context))
        assert drawn == list(generate(model, prompt, max_new_tokens=4, sampling=GREEDY, use_cache=False))
        ids = prompt + drawn


def test_the_same_prompt_again_is_read_again():
    """A token must be read for logits to come."""
    model, context = build(), Context()
    texts = []
    for _ in range(2):
        texts.append(list(generate(model, [1, 2, 3], max_new_tokens=1, sampling=GREEDY, context=context)))
        assert context.cache.length == 3
    assert texts[0] == texts[1]


def test_a_broken_off_pass_leaves_the_context_right(monkeypatch):
    model, context = build(torch.float64), Context()
    expected = list(generate(model, [1, 2, 3], max_new_tokens=9, sampling=GREEDY))
    last_block, calls = model.blocks[-1].forward, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return last_block(*arguments)

    monkeypatch.setattr(model.blocks[-1], "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(generate(model, [1, 2, 3], max_new_tokens=9, sampling=GREEDY, context=context))
    assert context.ids[3:] == expected[:3] and context.cache.length == 5
    with torch.inference_mode():
        next_logits = model(torch.tensor([context.ids[5:]]), cache=context.cache)
        torch.testing.assert_close(next_logits[:, -1], model(torch.tensor([context.ids]))[:, -1], rtol=0, atol=1e-10)
    assert list(generate(model, context.ids, max_new_tokens=6, sampling=GREEDY, context=context)) == expected[3:]


# ---- several at once --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "shift 3", "multi-head", "sequential pre-norm"])
@pytest.mark.parametrize("length", [1, 2, 40])
def test_a_batch_is_its_rows(name, length):
    model = build(torch.float64, **CONFIGS[name])
    prompts = some_ids(length, batch=3).tolist()
    batch = generate_batch(model, prompts, samples=2, max_new_tokens=10, sampling=GREEDY, prefill_chunk=7)
    alone = [list(generate(model, prompt, max_new_tokens=10, sampling=GREEDY)) for prompt in prompts]
    assert batch == [text for text in alone for _ in range(2)]


def test_samples_of_one_prompt_differ_and_repeat_with_the_seed():
    model = build()
    first, again = (generate_batch(model, [[1, 2]], samples=8, max_new_tokens=12, seed=5) for _ in range(2))
    assert first == again and len({tuple(text) for text in first}) == 8


def test_a_row_of_a_batch_ends_at_its_own_stop():
    model = build()
    plain = generate_batch(model, [[1, 2]], samples=6, max_new_tokens=30, seed=5)
    stop = plain[0][4]
    for text, whole in zip(
        generate_batch(model, [[1, 2]], samples=6, max_new_tokens=30, seed=5, stop_ids={stop}), plain, strict=True
    ):
        assert text == (whole[: whole.index(stop) + 1] if stop in whole else whole)


# ---- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "prompt is empty"),
        ([1, 61], {}, "token id 61 is out of range for num_tokens=61"),
        ([1, -1], {}, "token id -1 is out of range"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens=-1"),
        ([1], {"seed": -1}, "seed=-1"),
        ([1], {"seed": 2**63}, "seed=9223372036854775808"),
        ([1], {"prefill_chunk": 0}, "prefill_chunk=0"),
    ],
)
def test_wrong_arguments_are_refused_at_once(prompt, options, message):
    with pytest.raises(AndromedaError, match=message):
        generate(build(), prompt, **options)
    with pytest.raises(AndromedaError, match=message):
        generate_batch(build(), [prompt], **options)


def test_prompts_of_unequal_length_are_refused():
    with pytest.raises(AndromedaError, match="equal length"):
        generate_batch(build(), [[1], [1, 2]])


def test_a_broken_model_is_told_not_sampled():
    model = build()
    with torch.no_grad():
        next(model.blocks[1].parameters()).view(-1)[0] = torch.nan
    with pytest.raises(AndromedaError, match="NaN or infinity"):
        list(generate(model, [1, 2]))


def test_the_chunk_of_a_prompt_follows_from_the_memory():
    small, large = default_prefill_chunk(TINY), default_prefill_chunk(AndromedaConfig())
    assert small > large >= 1024
    assert default_prefill_chunk(AndromedaConfig(), batch=4) == pytest.approx(large / 4, abs=1)
