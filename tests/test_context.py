"""A sequence over several processes is the sequence in one: outputs, gradients, caches, and what is sent for it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from andromeda import context as context_module
from andromeda.cache import Cache
from andromeda.config import AndromedaConfig, preset
from andromeda.context import Context
from andromeda.errors import AndromedaError
from andromeda.inference.prefill import Prefill
from andromeda.kernels import attention_backend
from andromeda.kernels.launch import HAS_TRITON
from andromeda.model import IGNORED, Andromeda
from tests.interpreter import quick_interpreter
from tests.quick import quick
from tests.ranks import Ranks
from tests.test_model import FLAGS, TOKENS, block_of, build, gradients, some_ids

Group = dist.ProcessGroup


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(4, tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


# ---- what runs on each rank; `group` is the process group ----------------------------------------------------


def packed(tokens: int, seed: int, batch: int = 2) -> Tensor:
    """(B, T) document numbers, borders anywhere."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, tokens, generator=generator) < 3 / (tokens + 2)).long().cumsum(1)


def train(model: Andromeda, ids: Tensor, targets: Tensor, documents: Tensor | None, context: Context | None) -> Any:
    """Losses (B, T) and the gradients of all parameters, of the whole sequence, on each rank."""
    weights = torch.rand(targets.shape, generator=torch.Generator().manual_seed(3))
    if context is not None:
        ids, targets, weights = context.split(ids), context.split(targets), context.split(weights)
        documents = None if documents is None else context.split(documents)
    losses = model.token_losses(ids, targets, documents=documents, context=context)
    (losses * weights).sum().backward()
    grads = gradients(model)
    if context is not None:
        losses = context.join(losses)
        for grad in grads.values():
            dist.all_reduce(grad, group=context.group)
    return losses.detach(), grads


def whole(model: Andromeda, ids: Tensor, targets: Tensor, documents: Tensor | None) -> tuple[Tensor, Any, Any]:
    """Logits, losses and gradients of one process."""
    with torch.no_grad():
        logits = model(ids, documents=documents)
    return logits, *train(model, ids, targets, documents, None)


def by_one(group: Group, compute: Callable[[], Any]) -> Any:
    """What the first rank computes, on each."""
    answer = [compute() if group.rank() == 0 else None]
    dist.broadcast_object_list(answer, src=0, group=group)
    return answer[0]


def check_equal(
    group: Group, flags: str | dict[str, Any], tokens: int, documents: Tensor | None, tolerance: float = 1e-9,
    path: str | None = None, dtype: torch.dtype = torch.float64,
) -> None:  # fmt: skip
    """Logits, losses and every gradient are those of one process."""
    model, ids = build(flags, dtype), some_ids(2, tokens)
    targets = some_ids(2, tokens, seed=2)
    targets[0, tokens // 3] = IGNORED
    context = Context(tokens, group)
    own = None if documents is None else context.split(documents)
    with attention_backend(path) if path else nullcontext():
        with torch.no_grad():
            logits, last = (model(context.split(ids), documents=own, context=context, last_only=x) for x in (0, 1))
        losses, grads = train(model, ids, targets, documents, context)
    exact, exact_losses, exact_grads = by_one(group, lambda: whole(model, ids, targets, documents))
    torch.testing.assert_close(context.join(logits), exact, rtol=0, atol=tolerance)
    assert last.shape == (2, context.last.stop - context.last.start, exact.shape[2])
    torch.testing.assert_close(last, exact[:, -1:][:, : last.shape[1]], rtol=0, atol=tolerance)
    torch.testing.assert_close(losses, exact_losses, rtol=0, atol=tolerance)
    for name, grad in exact_grads.items():
        size = 1 + grad.abs().max().item()  # some are zero but for rounding
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=tolerance * size, msg=f"{name}: {flags}")


def check_interpreted(group: Group, flags: dict[str, Any], tokens: int, documents: Tensor | None) -> None:
    with quick_interpreter():
        check_equal(group, flags, tokens, documents, 2e-4, "triton", torch.float32)


def check_sweep(group: Group, seed: int, cases: int) -> None:
    """Any length, from one token on, with documents' borders anywhere."""
    draw = random.Random(seed)
    for _ in range(cases):
        flags, tokens = draw.choice(sorted(FLAGS)), draw.choice([draw.randint(1, 9), draw.randint(10, 64)])
        documents = packed(tokens, draw.randrange(1000)) if draw.random() < 0.6 else None
        try:
            check_equal(group, flags, tokens, documents)
        except AssertionError as error:
            raise AssertionError(f"{flags}, {tokens} tokens, documents {documents}: {error}") from error


def check_cache(group: Group, flags: str, tokens: int) -> None:
    """Filled by all ranks, on any of them it goes on as one that was filled there."""
    model, ids, cache, context = build(flags), some_ids(2, tokens + 5), Cache(), Context(tokens, group)
    with torch.no_grad():
        model(context.split(ids[:, :tokens]), cache=cache, context=context)
        assert cache.length == tokens
        steps = [model(ids[:, at : at + n], cache=cache) for at, n in ((tokens, 1), (tokens + 1, 4))]
        torch.testing.assert_close(torch.cat(steps, 1), model(ids)[:, tokens:], rtol=0, atol=1e-9)
        with pytest.raises(AndromedaError, match=f"the cache holds {tokens + 5} tokens; give it an empty cache"):
            model(context.split(ids[:, :tokens]), cache=cache, context=context)


def check_prefill(group: Group, flags: str, tokens: int) -> None:
    """One prompt, read by all: the logits of its last token on each, and a cache with which each goes on."""
    model, ids, cache = build(flags), some_ids(2, tokens + 1), Cache()
    logits = Prefill(model)(ids[:, :tokens], cache, Context(tokens, group))
    with torch.no_grad():
        exact = model(ids)
        torch.testing.assert_close(logits, exact[:, tokens - 1 : tokens], rtol=0, atol=1e-9)
        torch.testing.assert_close(model(ids[:, tokens:], cache=cache), exact[:, tokens:], rtol=0, atol=1e-9)


def check_repeats(group: Group) -> None:
    """Bit for bit."""
    model, ids = build(dtype=torch.float32), some_ids()
    context = Context(TOKENS, group)
    first, second = (train(model, ids, ids, packed(TOKENS, 1), context) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(grad, second[1][name]) for name, grad in first[1].items())


def count_sent(group: Group, config: AndromedaConfig, tokens: int, documents: bool) -> tuple[list[int], list[int]]:
    """Bytes that this rank gives to each exchange, in the forward and in the backward pass."""
    sent: dict[str, list[int]] = {"forward": [], "backward": []}
    gather, exchange = context_module._all_gather, dist.all_to_all_single

    def counted_gather(output: Tensor, x: Tensor, group: Group) -> None:
        sent["forward"].append(x.nbytes)
        gather(output, x, group=group)

    def counted_exchange(output: Tensor, x: Tensor, group: Group) -> None:
        sent["backward"].append(x.nbytes)
        exchange(output, x, group=group)

    model, context = Andromeda(config).bfloat16(), Context(tokens, group)
    ids = context.split(torch.zeros(1, tokens, dtype=torch.long))
    with (
        mock.patch.object(context_module, "_all_gather", counted_gather),
        mock.patch.object(dist, "all_to_all_single", counted_exchange),
    ):
        model.token_losses(ids, ids, documents=ids if documents else None, context=context).sum().backward()
    return sent["forward"], sent["backward"]


def count_pairs(group: Group, tokens: int, window: int) -> int:
    """Keys that the queries of this rank see."""
    positions = Context(tokens, group).positions(torch.device("cpu"))
    return int((positions + 1).clamp(max=window).sum())


def check_split(group: Group, tokens: int) -> int:
    """How many of its tokens are the sequence's last."""
    context, x = Context(tokens, group), torch.arange(2 * tokens * 3).view(2, tokens, 3)
    own = context.split(x, padding=-7)
    assert own.shape == (2, context.local_tokens, 3)
    assert torch.equal(context.join(own), x)
    everywhere = context.gather(own)
    assert torch.equal(everywhere[:, :tokens], x)
    assert (everywhere[:, tokens:] == -7).all()
    assert everywhere.shape[1] - tokens == context.padding < 2 * context.ranks
    assert torch.equal(own[:, context.last], x[:, tokens - 1 : tokens][:, : own[:, context.last].shape[1]])
    return context.last.stop - context.last.start


def check_refusals(group: Group) -> None:
    context, model, ids = Context(TOKENS, group), build(), some_ids()
    own = context.split(ids)
    with pytest.raises(AndromedaError, match=r"sequences of 45 tokens.*got \(2, 44\); make one for each length"):
        context.split(ids[:, 1:])
    for call in (
        lambda: model(ids, context=context),
        lambda: model(own, documents=ids, context=context),
        lambda: model.token_losses(own, ids, context=context),
        lambda: context.join(ids),
    ):
        with pytest.raises(AndromedaError, match=r"each has 24, .*got \(2, 45\); give what context.split returns"):
            call()
    with pytest.raises(AndromedaError, match="at least one token"):
        Context(0, group)
    limited = build("abs_pos_emb")
    with pytest.raises(AndromedaError, match="position 64 is beyond max_seq_len=64"):
        limited(Context(65, group).split(some_ids(2, 65)), context=Context(65, group))
    rank = dist.get_rank(group)
    alone = dist.new_group([0], use_local_synchronization=True) if rank == 0 else dist.GroupMember.NON_GROUP_MEMBER
    if rank:
        with pytest.raises(AndromedaError, match="this process is not in the group"):
            Context(5, alone)  # type: ignore[arg-type]


def check_second_derivatives(group: Group) -> None:
    """Refused, for what other ranks add to them would be left out."""
    context = Context(8, group)
    x = torch.randn(1, context.local_tokens, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(context.gather(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def check_checkpointing(group: Group) -> None:
    """Blocks computed again in the backward pass make their exchanges again."""
    model, ids, context = build(), some_ids(), Context(TOKENS, group)
    _, plain = train(model, ids, ids, None, context)
    for block in map(partial(block_of, model), range(model.config.depth)):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    _, again = train(model, ids, ids, None, context)
    assert all(torch.equal(again[name], grad) for name, grad in plain.items())


def check_autocast(group: Group) -> None:
    """Keys and values travel in bfloat16; what they are near to is one process's."""
    model, ids, context = build(dtype=torch.float32), some_ids(), Context(TOKENS, group)
    exact, exact_grads = train(model, ids, ids, None, None)
    with torch.autocast("cpu", torch.bfloat16):
        losses, grads = train(model, ids, ids, None, context)
    torch.testing.assert_close(losses, exact, rtol=0.1, atol=0.2)
    for name, grad in exact_grads.items():
        assert grads[name].dtype == torch.float32
        assert (grads[name] - grad).norm() < 0.1 * grad.norm(), name


def check_compiles(group: Group, parallel: bool) -> None:
    """A block in one graph, exchanges among it."""
    model, context = build({"parallel_blocks": parallel, "max_seq_len": 64, "attn_flash": False}), Context(40, group)
    x = torch.randn(2, context.local_tokens, 24, dtype=torch.float64, requires_grad=True)
    step, block = model._pass(40, 0, None, None, x.device, context), block_of(model)
    compiled = torch.compile(lambda x: block(x, step), backend="aot_eager", fullgraph=True)
    out, expected = compiled(x), block(x, step)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    learned, upstream = [x, *block.parameters()], torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad(y, learned, upstream) for y in (out, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


# ---- the tests -------------------------------------------------------------------------------------------------

SIZES = pytest.mark.parametrize("size", [2, 4])


class TestEqualToOneProcess:
    @pytest.mark.parametrize("flags", FLAGS)
    def test_with_every_flag(self, ranks: Ranks, flags: str) -> None:
        """45 tokens, which neither 4 nor 8 chunks divide; beyond the trained 16."""
        ranks(check_equal, 4, flags, TOKENS, None)

    @pytest.mark.parametrize("flags", quick(FLAGS, ["default", "shift_of_three", "gpt2_like"]))
    def test_with_every_flag_on_two(self, ranks: Ranks, flags: str) -> None:
        ranks(check_equal, 2, flags, TOKENS, None)

    @pytest.mark.parametrize("size", quick([2, 4], [4]))
    @pytest.mark.parametrize("flags", ["default", "abs_pos_emb", "shift_of_three", "multi_head", "pre_norm_sequential"])
    def test_packed_documents_cross_chunks(self, ranks: Ranks, size: int, flags: str) -> None:
        ranks(check_equal, size, flags, TOKENS, packed(TOKENS, 1))

    @pytest.mark.parametrize("size", quick([2, 4], [4]))
    @pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 16])
    def test_few_tokens(self, ranks: Ranks, size: int, tokens: int) -> None:
        """Fewer than chunks, and chunks shorter than the shift."""
        ranks(check_equal, size, "shift_of_three", tokens, packed(tokens, 1))
        ranks(check_equal, size, "default", tokens, None)

    @pytest.mark.parametrize("size", [1, 3])
    def test_other_numbers_of_ranks(self, ranks: Ranks, size: int) -> None:
        ranks(check_equal, size, "default", TOKENS, packed(TOKENS, 1))

    @pytest.mark.parametrize("size", [2, 3, 4])
    def test_any_length_and_borders(self, ranks: Ranks, size: int) -> None:
        ranks(check_sweep, size, size, 6)

    @pytest.mark.slow
    @pytest.mark.parametrize("size", [2, 3, 4])
    def test_many_lengths_and_borders(self, ranks: Ranks, size: int) -> None:
        ranks(check_sweep, size, 100 + size, 150)

    @SIZES
    @pytest.mark.parametrize("path", ["reference", "tiled", "short"])
    def test_on_every_path(self, ranks: Ranks, size: int, path: str) -> None:
        ranks(check_equal, size, "default", 120, packed(120, 1), 1e-9, path)

    @pytest.mark.skipif(not HAS_TRITON or torch.cuda.is_available(), reason="interprets the kernels, in float32")
    @pytest.mark.parametrize("documents", [True, pytest.param(False, marks=pytest.mark.slow)])
    def test_on_the_kernels(self, ranks: Ranks, documents: bool) -> None:
        flags = {"dim_head": 32, "heads": 2, "alibi_num_heads": 1, "depth": 1}
        borders = packed(50, 1) if documents else None
        ranks(check_interpreted, 2, flags, 50, borders)

    @SIZES
    def test_activation_checkpointing(self, ranks: Ranks, size: int) -> None:
        ranks(check_checkpointing, size)

    def test_training_in_bfloat16_by_autocast(self, ranks: Ranks) -> None:
        ranks(check_autocast, 2)

    @pytest.mark.parametrize("size", quick([2, 4], [4]))
    @pytest.mark.parametrize("flags", ["default", "shift_of_three", "no_shift", "pre_norm_sequential"])
    @pytest.mark.parametrize("tokens", [1, 11, 40])
    def test_a_cache_goes_on(self, ranks: Ranks, size: int, flags: str, tokens: int) -> None:
        ranks(check_cache, size, flags, tokens)

    @SIZES
    @pytest.mark.parametrize("tokens", [1, 2, 11, 40])
    def test_a_prompt_is_read_by_all(self, ranks: Ranks, size: int, tokens: int) -> None:
        ranks(check_prefill, size, "default", tokens)


class TestHowItIsSplit:
    @pytest.mark.parametrize("size", [1, 2, 3, 4])
    @pytest.mark.parametrize("tokens", [1, 7, 8, 41])
    def test_join_undoes_split(self, ranks: Ranks, size: int, tokens: int) -> None:
        assert sorted(ranks(check_split, size, tokens)) == [0] * (size - 1) + [1]

    @SIZES
    @pytest.mark.parametrize("window", [300, 10**9])
    def test_work_is_even(self, ranks: Ranks, size: int, window: int) -> None:
        pairs = ranks(count_pairs, size, 32_771, window)
        assert max(pairs) < 1.02 * min(pairs)

    def test_twice_the_same_bits(self, ranks: Ranks) -> None:
        ranks(check_repeats, 4)

    @SIZES
    def test_bytes_sent(self, ranks: Ranks, size: int) -> None:
        """As docs/attention.md says: 512 a token and block for keys and values of the default heads."""
        config = preset("2b", dim=64, depth=3, num_tokens=64, heads=2, alibi_num_heads=1)
        tokens, blocks, elements = 64, 3, 2  # bytes each
        for forward, backward in ranks(count_sent, size, config, tokens, False):
            borders = 2 * config.shift_tokens * config.dim * elements
            heads = 512 * tokens // size
            assert forward == [borders, heads] * blocks
            assert backward == [x * size for x in reversed(forward)]  # a part for each rank, its own among them
        for forward, _ in ranks(count_sent, size, config, tokens, True):
            assert forward == [8 * tokens // size, *[borders, heads] * blocks]

    @pytest.mark.slow
    @pytest.mark.parametrize("parallel", [False, True])
    def test_a_block_compiles_without_graph_breaks(self, ranks: Ranks, parallel: bool) -> None:
        ranks(check_compiles, 2, parallel)


class TestWhatIsRefused:
    def test_what_does_not_fit(self, ranks: Ranks) -> None:
        ranks(check_refusals, 2)

    def test_second_derivatives(self, ranks: Ranks) -> None:
        ranks(check_second_derivatives, 2)

    def test_no_process_group(self) -> None:
        with pytest.raises(AndromedaError, match="no process group to split a sequence over; start with torchrun"):
            Context(8)
