"""The model: every flag both ways, and the equalities that hold for all of them.

Full forward == chunks == token by token; packed == apart; tiled == dense; nothing sees ahead; every weight learns.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from andromeda import model as model_module
from andromeda.cache import Cache
from andromeda.config import PRESETS, AndromedaConfig, preset
from andromeda.errors import AndromedaError
from andromeda.kernels import BACKENDS, attention_backend
from andromeda.kernels import loss as loss_module
from andromeda.model import EMBEDDING_PROVIDERS, Andromeda, document_starts, register_embedding

# Small, but with all there is: windows of 15 to 93 tokens, global heads, and a trained length (16) that is exceeded.
BASE: dict[str, Any] = {
    "num_tokens": 31, "max_seq_len": 16, "dim": 24, "depth": 2, "dim_head": 4, "heads": 8, "alibi_num_heads": 6,
    "xpos_scale_base": 20.0, "window_epsilon": 0.5,
}  # fmt: skip
NO_QK_NORM = {"qk_norm": False, "attn_qk_norm": False, "attn_qk_norm_dim_scale": False}
FLAGS: dict[str, dict[str, Any]] = {
    "default": {},
    "abs_pos_emb": {"use_abs_pos_emb": True, "max_seq_len": 64},
    "no_alibi": {"alibi_pos_bias": False},
    "alibi_on_one_head": {"alibi_num_heads": 1},
    "alibi_on_all_heads": {"alibi_num_heads": 8},
    "plain_rotary": {"rotary_xpos": False},
    "attn_flash_off": {"attn_flash": False},
    "no_shift": {"shift_tokens": 0},
    "shift_of_three": {"shift_tokens": 3},
    "multi_head": {"attn_one_kv_head": False},
    "qk_norm_of_ten": {"attn_qk_norm": False},
    "attn_qk_norm_alone": {"qk_norm": False},
    "no_qk_norm": NO_QK_NORM,
    "no_gains": {"attn_qk_norm_dim_scale": False},
    "pre_norm": {"deepnorm": False},
    "sequential": {"parallel_blocks": False},
    "pre_norm_sequential": {"deepnorm": False, "parallel_blocks": False},
    "narrow_ff": {"ff_mult": 1},
    "gelu": {"ff_activation": "gelu"},
    "silu": {"ff_activation": "silu"},
    "tied": {"tie_embeddings": True},
    "default_xpos_scale": {"xpos_scale_base": None},
    "rotary_base": {"rotary_base": 100.0},
    "interpolation": {"position_interpolation": 3.0},
    "no_windows": {"window_epsilon": 0.0},
    "rotary_on_all_heads": {"rotary_heads": "all"},
    "no_rotary": {"rotary_heads": "none", "rotary_xpos": False},
    "no_log_n": {"log_n_temperature": False},
    "odd_heads": {"rotary_heads": "none", "rotary_xpos": False, "dim_head": 5},
    "gpt2_like": {
        "use_abs_pos_emb": True, "max_seq_len": 64, "alibi_pos_bias": False, "rotary_heads": "none",
        "rotary_xpos": False, "shift_tokens": 0, "attn_one_kv_head": False, **NO_QK_NORM, "deepnorm": False,
        "parallel_blocks": False, "ff_activation": "gelu",
    },
}  # fmt: skip
ALL_FLAGS = pytest.mark.parametrize("flags", FLAGS)
TOKENS = 45


def build(flags: str | dict[str, Any] = "default", dtype: torch.dtype = torch.float64) -> Andromeda:
    """A model whose gains and norms are not 1, so that leaving one out shows."""
    overrides = FLAGS[flags] if isinstance(flags, str) else flags
    torch.manual_seed(0)
    model = Andromeda(AndromedaConfig(**{**BASE, **overrides}))
    for name, parameter in model.named_parameters():
        if "gain" in name or "norm" in name:
            parameter.data.normal_(1, 0.2)
        elif "embedding" in name or "to_logits" in name:
            parameter.data.normal_()
    return model.to(dtype)


def block_of(model: Andromeda, index: int = 0) -> Any:
    return model.blocks[index]


def some_ids(batch: int = 2, tokens: int = TOKENS, seed: int = 1) -> Tensor:
    return torch.randint(BASE["num_tokens"], (batch, tokens), generator=torch.Generator().manual_seed(seed))


def in_chunks(model: Andromeda, ids: Tensor, sizes: list[int], path: str | None = None) -> Tensor:
    cache = Cache()
    with torch.no_grad(), attention_backend(path) if path else nullcontext():
        logits = [model(chunk, cache=cache) for chunk in ids.split(sizes, dim=1)]
    assert cache.length == ids.shape[1]
    return torch.cat(logits, 1)


def gradients(model: Andromeda) -> dict[str, Tensor]:
    """And resets them."""
    grads = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grads[name], parameter.grad = parameter.grad, None
    return grads


class TestOneFunctionHoweverItIsFed:
    @pytest.mark.parametrize(
        ("flags", "dtype"),
        [
            *((flags, torch.float64) for flags in FLAGS),
            *((flags, torch.float32) for flags in ("default", "gpt2_like", "pre_norm_sequential")),
        ],
    )
    def test_full_is_chunks_is_token_by_token(self, flags: str, dtype: torch.dtype) -> None:
        model, ids, atol = build(flags, dtype), some_ids(), 1e-10 if dtype == torch.float64 else 1e-4
        with torch.no_grad():
            full = model(ids)
        assert full.std() > 0.5
        for sizes in ([TOKENS], [1] * TOKENS, [2, 1, 17, 1, 1, 23]):
            torch.testing.assert_close(in_chunks(model, ids, sizes), full, rtol=0, atol=atol)
        torch.testing.assert_close(in_chunks(model, ids, [9, 1, 35], "tiled"), full, rtol=0, atol=atol)

    @settings(max_examples=25)
    @given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.sampled_from(sorted(FLAGS)))
    def test_any_chunking(self, sizes: list[int], flags: str) -> None:
        if FLAGS[flags].get("use_abs_pos_emb"):  # up to 64 tokens
            sizes = [min(size, 12) for size in sizes]
        model, ids = build(flags), some_ids(1, sum(sizes))
        with torch.no_grad():
            torch.testing.assert_close(in_chunks(model, ids, sizes), model(ids), rtol=0, atol=1e-10)

    @ALL_FLAGS
    def test_last_only(self, flags: str) -> None:
        model, ids = build(flags), some_ids()
        with torch.no_grad():
            torch.testing.assert_close(model(ids, last_only=True), model(ids)[:, -1:], rtol=0, atol=1e-12)

    @ALL_FLAGS
    def test_rows_of_a_batch_do_not_meet(self, flags: str) -> None:
        model, ids = build(flags), some_ids(3)
        with torch.no_grad():
            apart = torch.cat([model(row[None]) for row in ids])
            torch.testing.assert_close(model(ids), apart, rtol=0, atol=1e-10)

    def test_gradients_do_not_reach_into_the_cache(self) -> None:
        """Continuing a cache with gradients on keeps no graph of what came before."""
        model, ids, cache = build(), some_ids(), Cache()
        model(ids[:, :20], cache=cache)
        model(ids[:, 20:], cache=cache).sum().backward()
        state = cache.shift_state(0, 0)
        assert state is not None
        assert not state.requires_grad
        assert not cache.append(0, *[torch.zeros(2, 1, 1, 4, dtype=torch.float64)] * 2)[0].requires_grad


class TestEveryPathIsTheDenseOne:
    @ALL_FLAGS
    def test_forward_and_every_gradient(self, flags: str) -> None:
        """Of gains, norms and all matrices."""
        model, ids, results = build(flags), some_ids(), {}
        for path in ("reference", "tiled", "short"):
            with attention_backend(path):
                logits = model(ids)
                logits.logsumexp(-1).sum().backward()
            results[path] = {"logits": logits, **gradients(model)}
        for path in ("tiled", "short"):
            for name, exact in results["reference"].items():
                torch.testing.assert_close(results[path][name], exact, rtol=1e-9, atol=1e-9, msg=f"{path}: {name}")

    @pytest.mark.parametrize("path", ["tiled", "short"])
    @pytest.mark.parametrize("flags", ["default", "multi_head", "rotary_on_all_heads", "qk_norm_of_ten", "no_qk_norm"])
    def test_within_twice_the_error_of_the_dense_path_in_float32(self, flags: str, path: str) -> None:
        """Root mean square over six batches: a key gain is four numbers, whose error in one batch is luck."""
        squares: dict[tuple[str, str], float] = defaultdict(float)
        spare: dict[str, float] = {}
        for seed in range(6):
            exact = self.results("reference", torch.float64, flags, seed)
            for which in ("reference", path):
                for name, value in self.results(which, torch.float32, flags, seed).items():
                    squares[which, name] += (value.double() - exact[name]).square().mean().item() / 6
                    spare[name] = torch.finfo(torch.float32).eps * exact[name].abs().max().item()
        for name in spare:
            ours, plain = math.sqrt(squares[path, name]), math.sqrt(squares["reference", name])
            assert ours <= 2 * plain + spare[name], f"{name}: {ours:.1e}, plain PyTorch {plain:.1e}"

    def results(self, path: str, dtype: torch.dtype, flags: str, seed: int) -> dict[str, Tensor]:
        """Logits and all gradients, for the same weights, those of float32."""
        model = build(flags, torch.float32).to(dtype)
        with attention_backend(path):
            logits = model(some_ids(seed=seed))
            logits.logsumexp(-1).sum().backward()
        return {"logits": logits.detach(), **gradients(model)}

    def test_attn_flash_chooses_the_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        taken: list[str] = []

        def spied(name: str, path: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def spy(*args: Any) -> Tensor:
                taken.append(name)
                return path(*args)

            return spy

        for name, path in list(BACKENDS.items()):
            monkeypatch.setitem(BACKENDS, name, spied(name, path))
        for flash in (True, False):
            for tokens in (TOKENS, 300):
                build({"attn_flash": flash, "depth": 1})(some_ids(1, tokens))
        assert taken == ["short", "tiled", "reference", "reference"]


class TestPackedDocuments:
    # per row: lengths of documents; some longer than the trained length (16) and than the windows
    ROWS = ([20, 1, 1, 18, 5], [3, 42], [45])

    def documents(self) -> Tensor:
        """Numbers that say nothing but where a border is."""
        rows = [[7 + 3 * (d % 2) for d, length in enumerate(lengths) for _ in range(length)] for lengths in self.ROWS]
        return torch.tensor(rows)

    def apart(self, ids: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
        for row, lengths in enumerate(self.ROWS):
            start = 0
            for length in lengths:
                yield row, slice(start, start + length), ids[row : row + 1, start : start + length]
                start += length

    @ALL_FLAGS
    @pytest.mark.parametrize("path", ["tiled", "short"])
    def test_forward_and_gradients_are_those_of_separate_runs(self, flags: str, path: str) -> None:
        model, ids = build(flags), some_ids(3)
        weight = torch.randn(3, TOKENS, BASE["num_tokens"], dtype=torch.float64)
        with attention_backend(path):
            packed = model(ids, documents=self.documents())
            (packed * weight).sum().backward()
        grads = gradients(model)
        for row, place, document in self.apart(ids):
            alone = model(document)
            torch.testing.assert_close(packed[row : row + 1, place], alone, rtol=0, atol=1e-10)
            (alone * weight[row : row + 1, place]).sum().backward()
        for name, grad in gradients(model).items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-9, msg=name)

    def test_starts(self) -> None:
        documents = torch.tensor([[5, 5, 2, 2, 2, 5], [0, 1, 2, 3, 3, 3]])
        assert document_starts(documents).tolist() == [[0, 0, 2, 2, 2, 5], [0, 1, 2, 3, 3, 3]]

    def test_one_document_is_none(self) -> None:
        model, ids = build(), some_ids()
        with torch.no_grad():
            torch.testing.assert_close(model(ids, documents=torch.zeros_like(ids)), model(ids), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("held", [0, 3])
    def test_a_cache_holds_one_document(self, held: int) -> None:
        """Continued, several packed ones would see each other."""
        model, ids, cache = build(), some_ids(3), Cache()
        if held:
            model(ids[:, :held], cache=cache)
        with pytest.raises(AndromedaError, match="documents"):
            model(ids, cache=cache, documents=self.documents())

    def test_token_losses(self) -> None:
        model, ids, documents = build(), some_ids(3), self.documents()
        targets = torch.randint(31, ids.shape)
        targets[0, 5:9] = -100
        expected = -model(ids, documents=documents).log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])
        expected = expected[..., 0].masked_fill(targets == -100, 0.0)
        losses = model.token_losses(ids, targets, documents=documents)
        assert losses.dtype == torch.float64
        torch.testing.assert_close(losses, expected)
        assert model.bfloat16().token_losses(ids, targets).dtype == torch.float32

    def test_token_losses_in_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of logits never held at once: the same losses and gradients."""
        model, ids = build("tied"), some_ids()
        targets = ids.roll(-1, 1)
        results = []
        for rows in (1000, 7):
            monkeypatch.setattr(loss_module, "LOSS_CHUNK", rows * BASE["num_tokens"])
            losses = model.token_losses(ids, targets)
            losses.sum().backward()
            results.append({"losses": losses, **gradients(model)})
        for name in results[0]:
            torch.testing.assert_close(results[1][name], results[0][name])


class TestNothingSeesAhead:
    @ALL_FLAGS
    def test_a_token_changes_no_logits_before_it(self, flags: str) -> None:
        model, ids = build(flags), some_ids(1)
        with torch.no_grad():
            before = model(ids)
            for t in (1, 16, 30, TOKENS - 1):
                other = ids.clone()
                other[0, t] = (ids[0, t] + 1) % BASE["num_tokens"]
                after = model(other)
                torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
                assert (after[:, t] - before[:, t]).abs().max() > 1e-3

    @pytest.mark.parametrize("flags", ["no_shift", "default", "shift_of_three", "sequential"])
    def test_the_first_token_is_seen_by_the_last(self, flags: str) -> None:
        """Through the global heads, at any distance."""
        model, ids = build(flags), some_ids(1)
        other = ids.clone()
        other[0, 0] = (ids[0, 0] + 1) % BASE["num_tokens"]
        with torch.no_grad():
            assert (model(other)[:, -1] - model(ids)[:, -1]).abs().max() > 1e-8


class TestFlagsHaveTheirEffect:
    @pytest.mark.parametrize("flags", sorted(set(FLAGS) - {"default", "attn_flash_off", "attn_qk_norm_alone", "tied"}))
    def test_each_flag_changes_the_logits(self, flags: str) -> None:
        """On the weights that the two models share."""
        model, default, ids = build(flags), build(), some_ids()
        shared = {
            name: value
            for name, value in default.state_dict().items()
            if name in model.state_dict() and model.state_dict()[name].shape == value.shape
        }
        model.load_state_dict(shared, strict=False)
        with torch.no_grad():
            assert (model(ids) - default(ids)).abs().max() > 1e-6

    def test_attn_qk_norm_takes_the_place_of_qk_norm(self) -> None:
        with torch.no_grad():
            assert torch.equal(build("attn_qk_norm_alone")(some_ids()), build()(some_ids()))

    def test_log_n_counts_beyond_the_trained_length_only(self) -> None:
        sharp, plain, ids = build(), build("no_log_n"), some_ids()
        with torch.no_grad():
            moved = (sharp(ids) - plain(ids)).abs().amax((0, 2))
        assert (moved[:16] == 0).all()
        assert (moved[16:] > 0).all()

    def test_log_n_is_the_factor_on_global_heads(self) -> None:
        step = build()._pass(20, 0, None, None, torch.device("cpu"))
        assert step.q_scale is not None
        assert step.q_scale.shape == (1, 20, 8, 1)
        assert (step.q_scale[:, :, :6] == 1).all()
        expected = [max(1.0, math.log(i + 1) / math.log(16)) for i in range(20)]
        for head in (6, 7):
            assert step.q_scale[0, :, head, 0].tolist() == pytest.approx(expected)

    def test_without_windows_nothing_is_cut(self) -> None:
        """window_epsilon moves the output by little, but it moves it: the windows of BASE are shorter than TOKENS."""
        model = build()
        windows = block_of(model).attention.windows()
        assert windows.min() < TOKENS
        assert block_of(build("no_windows")).attention.windows() is None
        assert block_of(build("no_alibi")).attention.windows() is None
        assert block_of(build("no_qk_norm")).attention.windows() is None


class TestItLearns:
    @ALL_FLAGS
    @pytest.mark.parametrize("extra", [{"tie_embeddings": True}, {}], ids=["tied", "untied"])
    def test_every_parameter_gets_a_gradient(self, flags: str, extra: dict[str, Any]) -> None:
        torch.manual_seed(0)
        model = Andromeda(AndromedaConfig(**{**BASE, **FLAGS[flags], **extra}))
        ids = some_ids()
        model.token_losses(ids[:, :-1], ids[:, 1:]).mean().backward()
        for name, grad in gradients(model).items():
            assert grad.isfinite().all(), name
            dead = (grad == 0).flatten(1).all(1) if grad.dim() > 1 and "embedding" not in name else grad == 0
            assert not dead.all(), f"{name} never learns"
            assert dead.float().mean() < 0.5, f"{int(dead.sum())} of {len(dead)} rows of {name} never learn"

    @ALL_FLAGS
    def test_gradients_are_differences(self, flags: str) -> None:
        """Of each parameter, along a random direction: what the loss does, not what another path says."""
        model, ids = build(flags), some_ids()

        def loss() -> Tensor:
            return model(ids).logsumexp(-1).mean()

        loss().backward()
        step = 1e-6
        for name, grad in gradients(model).items():
            parameter, direction = model.get_parameter(name), torch.randn_like(grad)
            with torch.no_grad():
                ends = []
                for sign in (1, -2):  # to +step, then to -step
                    parameter.add_(direction, alpha=sign * step)
                    ends.append(loss().item())
                parameter.add_(direction, alpha=step)
            expected = (grad * direction).sum().item()
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(expected, rel=1e-4, abs=1e-7), name

    @ALL_FLAGS
    def test_it_fits_a_line(self, flags: str) -> None:
        torch.manual_seed(0)
        model = Andromeda(AndromedaConfig(**{**BASE, **FLAGS[flags]}))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        ids, losses = some_ids(1, 24), []
        for _ in range(8):
            loss = model.token_losses(ids[:, :-1], ids[:, 1:]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(math.log(31), abs=1.5)
        assert losses[-1] < losses[0] - 0.2

    @ALL_FLAGS
    def test_bfloat16_is_finite_and_near(self, flags: str) -> None:
        ids = some_ids()
        model = build(flags, torch.float32).bfloat16()  # round the weights first: they are the same in both
        with torch.no_grad():
            logits = model(ids)
            exact = model.double()(ids)
        assert logits.dtype == torch.bfloat16
        assert logits.isfinite().all()
        assert (logits.double() - exact).square().mean().sqrt() < 0.05 * exact.std()

    @pytest.mark.parametrize("path", ["reference", "tiled", "short"])
    def test_training_in_bfloat16_by_autocast(self, path: str) -> None:
        model, ids = build(dtype=torch.float32), some_ids()
        exact = model.token_losses(ids[:, :-1], ids[:, 1:])
        with attention_backend(path), torch.autocast("cpu", torch.bfloat16):
            losses = model.token_losses(ids[:, :-1], ids[:, 1:])
        losses.mean().backward()
        gradients(model)
        torch.testing.assert_close(losses, exact, rtol=0.1, atol=0.2)

    @pytest.mark.parametrize("activation", ["relu2", "gelu", "silu"])
    def test_second_derivatives_are_right(self, activation: str) -> None:
        """Gradients of gradients, of a penalty, say."""
        torch.manual_seed(0)
        feed_forward = block_of(build({"ff_activation": activation})).feed_forward
        x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(feed_forward, (x,))

    def test_bfloat16_keeps_the_slopes(self) -> None:
        """2^-0.5 is no bfloat16; rounded, the bias at a distance is another than the trained one."""
        model = Andromeda(AndromedaConfig(**{**BASE, "heads": 12, "alibi_num_heads": 12}))
        slopes = block_of(model).attention.slopes.clone()
        assert torch.equal(block_of(model.bfloat16()).attention.slopes.float(), slopes)


class TestInitialisation:
    def matrices(self, **overrides: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = Andromeda(AndromedaConfig(num_tokens=64, max_seq_len=64, dim=256, depth=2, dim_head=32, heads=8,
                                          alibi_num_heads=4, attn_one_kv_head=False, **overrides))  # fmt: skip
        block = block_of(model)
        q_and_k, v = block.attention.to_qkv.weight.split([512, 256])
        return {
            "q_and_k": q_and_k, "v": v, "out": block.attention.to_out.weight, "up": block.feed_forward.up.weight,
            "down": block.feed_forward.down.weight, "embedding": model.output_weight,
        }  # fmt: skip

    def gain(self, weight: Tensor) -> float:
        """Standard deviation against Xavier's."""
        return weight.std().item() / math.sqrt(2 / sum(weight.shape))

    def test_deepnorms_gains(self) -> None:
        """Wang et al. 2022: beta = (8N)^(-1/4) on v, out and the feed-forward, 1 on q and k."""
        matrices = self.matrices()
        for name in ("v", "out", "up", "down"):
            assert self.gain(matrices[name]) == pytest.approx(16**-0.25, rel=0.03), name
        assert self.gain(matrices["q_and_k"]) == pytest.approx(1.0, rel=0.03)
        assert matrices["embedding"].std().item() == pytest.approx(0.02, rel=0.05)

    def test_pre_norm_scales_the_residual_branches(self) -> None:
        matrices = self.matrices(deepnorm=False)
        for name, gain in {"q_and_k": 1, "v": 1, "up": 1, "out": 4**-0.5, "down": 4**-0.5}.items():
            assert self.gain(matrices[name]) == pytest.approx(gain, rel=0.03), name

    def test_gains_and_norms_begin_at_one(self) -> None:
        for flags in ("default", "pre_norm_sequential"):
            for name, parameter in Andromeda(AndromedaConfig(**{**BASE, **FLAGS[flags]})).named_parameters():
                if "gain" in name or "norm" in name:
                    assert (parameter == 1).all(), name

    def test_deepnorm_is_the_papers_residual(self) -> None:
        """x <- LN(alpha x + f(x)), alpha = (2N)^(1/4): seen where every branch is silent."""
        model, ids = build({"depth": 8}), some_ids(1)
        for block in map(partial(block_of, model), range(8)):
            block.attention.to_out.weight.data.zero_()
            block.feed_forward.down.weight.data.zero_()
            block.norm.weight.data.fill_(2.0)
        with torch.no_grad():
            x = model.embedding(ids)
            for _ in range(8):
                x = 2 * nn.functional.layer_norm(2.0 * x, (24,))  # (2 * 8)^(1/4) = 2
            torch.testing.assert_close(model.hidden(ids), x, rtol=0, atol=1e-10)

    def test_a_seed_repeats(self) -> None:
        a, b = build(), build()
        assert all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


class TestParameterCount:
    def count(self, config: AndromedaConfig) -> None:
        with torch.device("meta"):
            model = Andromeda(config)
        total = sum(parameter.numel() for parameter in model.parameters())
        assert config.num_parameters() == total
        vocabulary = {"embedding.weight", "to_logits.weight", "position_embedding.weight"}
        inner = sum(p.numel() for name, p in model.named_parameters() if name not in vocabulary)
        assert config.num_parameters(embedding=False) == inner

    @pytest.mark.parametrize("name", PRESETS)
    def test_of_presets(self, name: str) -> None:
        self.count(preset(name))

    @ALL_FLAGS
    def test_of_flags(self, flags: str) -> None:
        self.count(AndromedaConfig(**{**BASE, **FLAGS[flags]}))

    def test_a_model_built_without_memory_can_be_filled(self) -> None:
        model = build()
        with torch.device("meta"):
            empty = Andromeda(model.config)
        empty.to_empty(device="cpu")
        for index in range(model.config.depth):
            block_of(empty, index).attention.reset_buffers()
        empty.double().load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(empty(some_ids()), model(some_ids()))


class Doubled(nn.Module):
    """An embedding that is no table: no weight to tie."""

    def __init__(self, config: AndromedaConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.num_tokens, config.dim)

    def forward(self, ids: Tensor) -> Tensor:
        return 2 * self.table(ids)


class TestEmbeddingProvider:
    def config(self, **overrides: Any) -> AndromedaConfig:
        return AndromedaConfig(**{**BASE, **overrides})

    @pytest.fixture(autouse=True)
    def _registry(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in list(EMBEDDING_PROVIDERS):
            monkeypatch.setitem(EMBEDDING_PROVIDERS, name, EMBEDDING_PROVIDERS[name])  # restored, new ones too
        monkeypatch.setattr(model_module, "EMBEDDING_PROVIDERS", dict(EMBEDDING_PROVIDERS))

    def test_a_module_of_ones_own(self) -> None:
        config = self.config(tie_embeddings=False)
        mine = Doubled(config)
        table = mine.table.weight.detach().clone()
        model = Andromeda(config, mine)
        assert model.embedding is mine
        assert torch.equal(mine.table.weight, table)
        assert model(some_ids()).shape == (2, TOKENS, 31)

    def test_by_registered_name(self) -> None:
        register_embedding("Doubled")(Doubled)
        model = Andromeda(self.config(tie_embeddings=False, embedding_provider="Doubled"))
        assert isinstance(model.embedding, Doubled)
        ids = some_ids()
        model.token_losses(ids, ids).sum().backward()
        assert next(model.embedding.parameters()).grad is not None

    def test_a_registered_one_keeps_its_weights(self) -> None:
        """What a provider was given, vectors trained elsewhere, say, is not drawn anew."""
        vectors = torch.randn(31, 24)
        register_embedding("Pretrained")(lambda _: nn.Embedding.from_pretrained(vectors.clone(), freeze=False))
        assert torch.equal(
            Andromeda(self.config(embedding_provider="Pretrained", tie_embeddings=True)).output_weight, vectors
        )

    def test_a_module_that_can_be_tied_is(self) -> None:
        mine = nn.Embedding(31, 24)
        vectors = mine.weight.detach().clone()
        model = Andromeda(self.config(tie_embeddings=True), mine)
        assert model.output_weight is mine.weight
        assert torch.equal(mine.weight, vectors)

    def test_an_unknown_name_is_named(self) -> None:
        with pytest.raises(AndromedaError, match=r"embedding_provider='Nomic'.*one of AndromedaEmbedding"):
            Andromeda(self.config(embedding_provider="Nomic"))

    def test_what_cannot_be_tied_is_refused(self) -> None:
        for wrong in (Doubled(self.config()), nn.Embedding(30, 24), nn.Embedding(31, 25)):
            with pytest.raises(AndromedaError, match=r"tie_embeddings=True.*set tie_embeddings=False"):
                Andromeda(self.config(tie_embeddings=True), wrong)

    def test_tied_and_untied(self) -> None:
        tied, untied = build("tied"), build()
        assert tied.output_weight is tied.embedding.weight
        assert untied.output_weight is not untied.embedding.weight
        assert set(untied.state_dict()) - set(tied.state_dict()) == {"to_logits.weight"}
        hidden = torch.randn(2, 24, dtype=torch.float64)
        torch.testing.assert_close(untied.logits(hidden), hidden @ untied.to_logits.weight.T)


class TestWhatIsRefused:
    @pytest.mark.parametrize("wrong", [31, -1, 10**9])
    def test_a_token_id_out_of_range(self, wrong: int) -> None:
        ids = some_ids()
        ids[1, 7] = wrong
        with pytest.raises(AndromedaError, match=f"token id {wrong} is out of range for num_tokens=31"):
            build()(ids)
        with pytest.raises(AndromedaError, match=f"token id {wrong}"):
            build().token_losses(ids, some_ids())

    @pytest.mark.parametrize("shape", [(5,), (1, 0), (1, 5, 1)])
    def test_ids_of_another_shape(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(AndromedaError, match="token ids must be"):
            build()(torch.zeros(shape, dtype=torch.long))

    def test_learned_positions_end(self) -> None:
        model, cache = build("abs_pos_emb"), Cache()
        with torch.no_grad():
            model(some_ids(1, 60), cache=cache)
            with pytest.raises(AndromedaError, match="position 64 is beyond max_seq_len=64"):
                model(some_ids(1, 5), cache=cache)
            assert cache.length == 60
            model(some_ids(1, 4), cache=cache)

    def test_others_do_not(self) -> None:
        assert build()(some_ids(1, 200)).isfinite().all()


class TestAPassBrokenOff:
    @pytest.mark.parametrize("flags", ["default", "sequential", "shift_of_three"])
    @pytest.mark.parametrize("held", [0, 1, 20])
    def test_leaves_the_cache_as_it_was(self, flags: str, held: int) -> None:
        """An error in the second block, after the first has written its keys and its shift state."""
        model, ids, cache = build(flags), some_ids(), Cache()

        def fail(*_: Any) -> None:
            raise RuntimeError("broken off")

        with torch.no_grad():
            full = model(ids)
            if held:
                model(ids[:, :held], cache=cache)
            handle = block_of(model, 1).feed_forward.register_forward_hook(fail)
            for lost in (1, 9):
                with pytest.raises(RuntimeError, match="broken off"):
                    model(torch.flip(ids, [1])[:, :lost], cache=cache)
            handle.remove()
            assert cache.length == held
            torch.testing.assert_close(model(ids[:, held:], cache=cache), full[:, held:], rtol=0, atol=1e-10)


def test_cached_windows_are_the_weights_own() -> None:
    """The weights do not change while a cache lives, so its windows are worked out once."""
    model, cache = build(), Cache()
    with torch.no_grad():
        model(some_ids(), cache=cache)
    assert len(cache.certificates) == model.config.depth
    for index, (_, windows) in cache.certificates.items():
        assert windows is not None
        assert torch.equal(windows, block_of(model, index).attention.windows())
