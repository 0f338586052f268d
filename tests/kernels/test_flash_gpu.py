"""The Triton kernels on a GPU: precision, length, repeatability, torch.compile. One command: make test-gpu."""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.config import preset
from andromeda.kernels import Geometry, QKNorm, Rotary, attention, attention_backend
from andromeda.kernels.launch import has_hopper_gluon
from andromeda.kernels.reference import reference_attention
from andromeda.model import Andromeda
from andromeda.positions import alibi_slopes, certified_windows
from tests.kernels.sanitizer import races

pytestmark = pytest.mark.gpu
NAMES = ("out", "dq", "dk", "dv")


def geometry(heads: int, local: int, dim_head: int, xpos: bool = True, bound: float | None = None) -> Geometry:
    slopes = torch.tensor(alibi_slopes(local) + [0.0] * (heads - local), device="cuda")
    bounds = torch.full((heads,), bound or math.sqrt(dim_head), dtype=torch.float64, device="cuda")
    rotary = Rotary(local, dim_head // 2, xpos_scale=512.0 if xpos else None)
    windows = certified_windows(bounds, slopes.double(), 1e-4)
    return Geometry(slopes=slopes, windows=windows, bounds=bounds, rotary=rotary, local_heads=local)


def inputs(queries: int, heads: int, dim_head: int, *, kv_heads: int = 1, keys: int | None = None) -> list[Tensor]:
    """Fresh at each call."""

    def unit(tokens: int, count: int) -> Tensor:
        return F.normalize(torch.randn(1, tokens, count, dim_head, device="cuda"), dim=-1)

    keys = keys or queries
    q = unit(queries, heads) * math.sqrt(dim_head)
    return [q, unit(keys, kv_heads), torch.randn(1, keys, kv_heads, dim_head, device="cuda")]


def run(function: Callable[..., Tensor], xs: list[Tensor], g: Geometry, dtype: torch.dtype) -> list[Tensor]:
    given = [x.detach().to(dtype).requires_grad_() for x in xs]
    out = function(*given, g)
    weight = torch.randn(out.shape, generator=torch.Generator("cuda").manual_seed(3), device="cuda").to(dtype)
    return [out.detach(), *torch.autograd.grad(out, given, weight)]


def in_parts(xs: list[Tensor], g: Geometry, dtype: torch.dtype) -> list[Tensor]:
    """The reference, a head and 256 queries at a time: all at once it would take too much memory."""
    q, k, v = xs
    group, offset = q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    out, dq = torch.empty_like(q, dtype=dtype), torch.empty_like(q, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device="cuda") for x in (k, v))
    weight = torch.randn(q.shape, generator=torch.Generator("cuda").manual_seed(3), device="cuda").to(q.dtype)
    for h, rows in itertools.product(range(q.shape[2]), torch.arange(q.shape[1]).split(256)):
        assert g.slopes is not None and g.windows is not None and g.rotary is not None
        first, end = int(rows[0]), int(rows[-1]) + 1
        seen, own, kv = slice(0, offset + end), slice(first, end), slice(h // group, h // group + 1)
        one = Geometry(
            slopes=g.slopes[h : h + 1], windows=g.windows[h : h + 1],
            rotary=replace(g.rotary, heads=1) if h < g.rotary.heads else None,
            starts=None if g.starts is None else g.starts[:, seen],
        )  # fmt: skip
        given = [x.detach().to(dtype).requires_grad_() for x in (q[:, own, h : h + 1], k[:, seen, kv], v[:, seen, kv])]
        part = reference_attention(given[0], given[1], given[2], one)
        gradients = torch.autograd.grad(part, given, weight[:, own, h : h + 1].to(dtype))
        out[:, own, h : h + 1], dq[:, own, h : h + 1] = part.detach(), gradients[0]
        dk[:, seen, kv] += gradients[1]
        dv[:, seen, kv] += gradients[2]
    return [out, dq, dk.to(dtype), dv.to(dtype)]


def relative_error(x: Tensor, truth: Tensor) -> float:
    assert x.isfinite().all()
    return float((x.double() - truth).norm() / truth.norm().clamp(min=1e-30))


def compare(xs: list[Tensor], g: Geometry, dtype: torch.dtype) -> None:
    """Ours at most twice as far from float64 as plain PyTorch in the same precision; all start from the same inputs."""
    xs = [x.to(dtype) for x in xs]
    truth, plain = in_parts(xs, g, torch.float64), in_parts(xs, g, dtype)
    with attention_backend("triton"):
        ours = run(attention, xs, g, dtype)
    for name, x, p, t in zip(NAMES, ours, plain, truth, strict=True):
        if xs[0].shape[1] == 1 and name in ("dq", "dk"):
            assert x.abs().max() < 0.1, name  # exactly zero but for rounding: one key has all the weight
        else:
            assert relative_error(x, t) <= 2 * relative_error(p, t) + 1e-6, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("tokens", [1, 63, 127, 1000, 4096, 8192])
def test_error_is_at_most_twice_plain_pytorchs(tokens: int, dtype: torch.dtype) -> None:
    compare(inputs(tokens, 4, 128), geometry(4, 2, 128), dtype)


@pytest.mark.parametrize("dim_head", [32, 64])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_other_shapes(dim_head: int, kv_heads: int) -> None:
    compare(inputs(777, 4, dim_head, kv_heads=kv_heads), geometry(4, 2, dim_head), torch.bfloat16)


@pytest.mark.parametrize(
    "change",
    [
        {"bounds": None}, {"rotary": Rotary(4, 64, xpos_scale=512.0)}, {"rotary": Rotary(2, 64)},
        {"rotary": Rotary(4, 64, xpos_scale=64.0)}, {"starts": "documents"}, {"queries": 200},
    ],
    ids=["running maximum", "rotary on all heads", "plain rotary", "short chunks", "documents", "chunk of queries"],
)  # fmt: skip
def test_flags(change: dict[str, object]) -> None:
    g, tokens = geometry(4, 2, 128), 1500
    xs = inputs(int(str(change.pop("queries", tokens))), 4, 128, keys=tokens)
    if change.get("starts") == "documents":
        index = torch.arange(tokens, device="cuda")
        change = {"starts": torch.where(index < 411, 0, torch.where(index < 1029, 411, 1029))[None]}
    compare(xs, replace(g, **change), torch.bfloat16)  # type: ignore[arg-type]


def test_two_runs_are_bit_identical() -> None:
    xs, g = inputs(3001, 8, 128), geometry(8, 4, 128)
    for first, second in zip(run(attention, xs, g, torch.bfloat16), run(attention, xs, g, torch.bfloat16), strict=True):
        assert torch.equal(first, second)


def test_200_000_tokens() -> None:
    tokens, g = 200_000, geometry(4, 2, 128)
    q, k, v = (x.bfloat16() for x in inputs(tokens, 4, 128))
    out = attention(q, k, v, g)
    assert out.isfinite().all()
    for row in (0, 1, 8_191, 65_537, 131_071, 199_999):
        truth = reference_attention(
            q[:, row : row + 1].double(), k[:, : row + 1].double(), v[:, : row + 1].double(), g
        )  # fmt: skip
        assert relative_error(out[:, row : row + 1], truth) < 0.01


@pytest.mark.parametrize("parallel", [True, False])
def test_a_block_compiles_without_graph_breaks(parallel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused preparation among it, for plain PyTorch's is not there."""
    monkeypatch.delattr(QKNorm, "__call__")
    config = preset("150m", num_tokens=512, depth=1, dim=256, heads=4, alibi_num_heads=2, parallel_blocks=parallel)
    model = Andromeda(config).to("cuda", torch.bfloat16)
    x = torch.randn(1, 300, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    step = model._pass(300, 0, None, None, x.device)
    compiled = torch.compile(lambda x: model.blocks[0](x, step), fullgraph=True)
    out, expected = compiled(x), model.blocks[0](x, step)
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.05)
    learned, upstream = [x, *model.blocks[0].parameters()], torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad(y, learned, upstream) for y in (out, expected)), strict=True):
        assert relative_error(a, b.double()) < 0.05


def test_operator_passes_opcheck() -> None:
    from andromeda.kernels import flash, rotate

    g = geometry(4, 2, 128)
    q, k, v = (x.bfloat16().requires_grad_() for x in inputs(130, 4, 128))
    q = rotate.rotate_queries(q, g.rotary, 0, flash.LOG2_E).detach().requires_grad_()
    keys = rotate.stack_keys(k, g.rotary).detach().requires_grad_()
    arguments = (q, keys, v, g.slopes, g.windows, g.bounds, g.starts, 2, 2, 512.0, 1.0)
    torch.library.opcheck(
        flash._attend, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


def plain(q: Tensor, keys: Tensor, v: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Global heads by PyTorch: out (B, T, heads, 128) and lse (B, heads, T) in base 2, of prepared inputs."""
    group, offset = q.shape[2] // v.shape[2], v.shape[1] - q.shape[1]
    logits = torch.einsum("bqhd,bhkd->bhqk", q, keys[0].repeat_interleave(group, 1))
    hidden = torch.ones(logits.shape[2:], dtype=torch.bool, device="cuda").triu(offset + 1)
    if starts is not None:
        hidden = hidden | (torch.arange(v.shape[1], device="cuda") < starts[:, None, offset:, None])
    logits = logits.masked_fill(hidden, -math.inf) * math.log(2)
    v = v.repeat_interleave(group, 2)
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v), logits.logsumexp(-1) / math.log(2)


@on_hopper
class TestRing:
    """Global heads, by flash_hopper.py: prepared queries and keys against float64."""

    @staticmethod
    def given(
        queries: int, keys: int, *, batch: int = 1, heads: int = 4, kv_heads: int = 1, e4m3: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of up to 11.3 nats, shared out evenly among q and k; NaN beyond each row's keys and values."""

        def beside_nan(*shape: int) -> Tensor:
            longer = torch.full((*shape[:-2], shape[-2] + 70, shape[-1]), math.nan, device="cuda")
            longer[..., : shape[-2], :] = F.normalize(torch.randn(shape, device="cuda"), dim=-1)
            return longer

        size, dtype = math.sqrt(11.3 * math.log2(math.e)), torch.float8_e4m3fn if e4m3 else torch.bfloat16
        q = (size * F.normalize(torch.randn(batch, queries, heads, 128, device="cuda"), dim=-1)).to(dtype)
        k = (size * beside_nan(1, batch, kv_heads, keys, 128)).to(dtype)[..., :keys, :]
        v = (10 * beside_nan(batch, kv_heads, keys, 128)).bfloat16()[..., :keys, :].transpose(1, 2)
        return q, k, v

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """out and lse by the ring alone, NaN where it stores nothing."""
        from andromeda.kernels import flash_hopper

        batch, queries, heads, _ = q.shape
        out = torch.full_like(q, math.nan, dtype=torch.bfloat16)
        lse = torch.full((batch, heads, queries), math.nan, device="cuda")
        bounds = torch.full((heads,), 11.3, dtype=torch.float64, device="cuda") if bounds is None else bounds
        flash_hopper.launch(q, k, v, bounds, out, lse, 0, heads, 0, 1.0)
        return out, lse

    @staticmethod
    def exact(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """out (B, T, heads, 128) and lse (B, heads, T) in base 2."""
        return plain(*(x.to(torch.bfloat16).to(dtype) for x in (q, k, v)))

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """At most twice as far from the truth as plain PyTorch in bfloat16, in e4m3 from that of the rounded inputs."""
        (out, lse), (truth, true_lse) = self.attend(q, k, v), self.exact(q, k, v)
        # A weight and its sum are rounded apart, which `flash` leaves to the running maximum where keys are few.
        spare = 2**-8 if k.shape[3] <= 64 else 1e-6
        assert relative_error(out, truth) <= 2 * relative_error(self.exact(q, k, v, torch.bfloat16)[0], truth) + spare
        # e4m3's products are summed in fewer bits than float32 has
        assert (lse - true_lse).abs().max() < (2e-2 if q.dtype == torch.float8_e4m3fn else 1e-4)

    @pytest.mark.parametrize("e4m3", [False, True], ids=["bf16", "e4m3"])
    @pytest.mark.parametrize("tokens", [1, 63, 64, 65, 127, 128, 129, 192, 193, 449, 577, 1000, 4096, 4133])
    def test_any_length(self, tokens: int, e4m3: bool) -> None:
        self.check(*self.given(tokens, tokens, e4m3=e4m3))

    @pytest.mark.parametrize("e4m3", [False, True], ids=["bf16", "e4m3"])
    @pytest.mark.parametrize(("queries", "keys"), [(1, 65), (1, 300), (64, 700), (130, 131), (777, 5000), (2048, 4097)])
    def test_chunk_of_queries(self, queries: int, keys: int, e4m3: bool) -> None:
        self.check(*self.given(queries, keys, e4m3=e4m3))

    @pytest.mark.parametrize("e4m3", [False, True], ids=["bf16", "e4m3"])
    @pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(3, 4, 1), (1, 1, 1), (2, 6, 2), (3, 4, 4)])
    def test_batches_and_key_heads(self, batch: int, heads: int, kv_heads: int, e4m3: bool) -> None:
        for queries, keys in ((707, 707), (333, 1001)):
            self.check(*self.given(queries, keys, batch=batch, heads=heads, kv_heads=kv_heads, e4m3=e4m3))

    @pytest.mark.parametrize("local", [0, 2])
    def test_out_in_e4m3(self, local: int) -> None:
        """As in bfloat16, multiplied and rounded; by the Triton kernel what local heads there are."""
        from andromeda.kernels.flash import prepared_attention

        q, k, v = self.given(1000, 1000, e4m3=local == 0)
        bounds = torch.full((4,), 11.3, dtype=torch.float64, device="cuda")
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device="cuda")
        geometry = Geometry(slopes=slopes, bounds=bounds, local_heads=local)
        wanted, out = (
            torch.full(q.shape, math.nan, device="cuda").to(x) for x in (torch.bfloat16, torch.float8_e4m3fn)
        )
        prepared_attention(q, k, v, geometry, out=wanted)
        prepared_attention(q, k, v, geometry, out=out, out_scale=8.0)
        error, wanted = (out.float() - 8 * wanted.float()).abs(), wanted.float().abs()
        assert (error <= 8 * wanted * (2**-4 + 2**-8) + 2**-10).all()
        prepared_attention(q, k, v, geometry, out=out, out_scale=1e6)
        assert out.float().abs().max() == 448

    def test_a_head_of_too_large_a_bound_is_left_alone(self) -> None:
        q, k, v = self.given(1500, 1500)
        out, lse = self.attend(q, k, v)
        bounds = torch.tensor([11.3, 40.1, 39.9, 60.0], dtype=torch.float64, device="cuda")
        left_out, left_lse = self.attend(q, k, v, bounds)
        for h, alone in enumerate((False, True, False, True)):
            assert left_out[:, :, h].isnan().all() if alone else torch.equal(left_out[:, :, h], out[:, :, h])
            assert left_lse[:, h].isnan().all() if alone else torch.equal(left_lse[:, h], lse[:, h])
        from andromeda.kernels.flash import prepared_attention

        served = prepared_attention(q, k, v, Geometry(bounds=bounds, local_heads=0))
        assert relative_error(served, self.exact(q, k, v)[0]) < 0.01
        assert torch.equal(served[:, :, ::2], out[:, :, ::2])

    @pytest.mark.parametrize("e4m3", [False, True], ids=["bf16", "e4m3"])
    def test_many_runs_are_bit_identical(self, e4m3: bool) -> None:
        q, k, v = self.given(3001, 9001, heads=24, e4m3=e4m3)
        first = self.attend(q, k, v)
        for _ in range(20):
            assert all(map(torch.equal, self.attend(q, k, v), first))

    def test_the_output_may_lie_where_the_queries_do(self) -> None:
        from andromeda.kernels.flash import prepared_attention

        q, k, v = self.given(1111, 1111)
        expected, wide = self.attend(q, k, v)[0], torch.randn(1, 1111, 7, 128, device="cuda").bfloat16()
        wide[:, :, 2:6] = q
        inside = wide[:, :, 2:6]
        bounds = torch.full((4,), 11.3, dtype=torch.float64, device="cuda")
        assert prepared_attention(inside, k, v, Geometry(bounds=bounds, local_heads=0), out=inside) is inside
        assert torch.equal(inside, expected)

    def test_attention_goes_through_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from andromeda.kernels import flash_hopper

        heads: list[tuple[Any, ...]] = []
        launch = flash_hopper.launch

        def seen(*arguments: Any) -> None:
            heads.append(arguments[6:])
            launch(*arguments)

        monkeypatch.setattr(flash_hopper, "launch", seen)
        q, k, v = (x.bfloat16() for x in inputs(300, 4, 128))
        with attention_backend("triton"):
            attention(q, k, v, geometry(4, 2, 128))
        assert heads == [(2, 2, 0, 1.0)]


def documents(batch: int, tokens: int, *lengths: int) -> Tensor:
    """starts (B, T): documents of these lengths again and again, in each row from another on."""
    starts = torch.empty(batch, tokens, dtype=torch.int64, device="cuda")
    for b in range(batch):
        turned = [*lengths[b % len(lengths) :], *lengths[: b % len(lengths)]]
        borders = [0, *itertools.accumulate(itertools.islice(itertools.cycle(turned), tokens))]
        for first, end in itertools.pairwise(borders):
            starts[b, first:end] = first
    return starts


@on_hopper
class TestGradientRing:
    """Gradients of global heads, by flash_hopper_backward.py, beside the Triton kernels' and float64."""

    @staticmethod
    def given(
        queries: int, keys: int | None = None, *, batch: int = 1, heads: int = 4, kv_heads: int = 1,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """out, dout, lse, q, keys, v as `flash._dq` takes them."""
        from andromeda.kernels import flash

        q, k, v = TestRing.given(queries, keys or queries, batch=batch, heads=heads, kv_heads=kv_heads)
        dout = torch.randn(q.shape, device="cuda").bfloat16()
        out, lse = torch.empty_like(q), torch.empty(batch, heads, queries, device="cuda")
        flash._forward(out, lse, q, k, v, None, None, None, starts, 0, 0, 0.0, 1.0)
        return out, dout, lse, q, k, v

    @staticmethod
    def gradients(
        given: tuple[Tensor, ...], ring: bool = True, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq (B, T, heads, 128), dkeys (1, B, kv_heads, S, 128) and dv (B, S, kv_heads, 128)."""
        from andromeda.kernels import flash

        out, dout, lse, q, k, v = given
        with pytest.MonkeyPatch.context() as patch:
            if not ring:
                patch.setattr(flash, "fits_the_dq_ring", lambda *_: False)
            dq, delta = flash._dq(out, dout, lse, q, k, v, None, None, starts, 0, None)
            return dq, *flash._dkv(dout, lse, delta, q, k, v, None, None, starts, 0, None)

    def check(self, given: tuple[Tensor, ...], starts: Tensor | None = None) -> None:
        _, dout, _, *inputs = given
        q, k, v = exact = [x.double().requires_grad_() for x in inputs]
        truths = torch.autograd.grad(plain(q, k, v, starts)[0], exact, dout.double())
        both = self.gradients(given, True, starts), self.gradients(given, False, starts)
        for ours, triton, truth in zip(*both, truths, strict=True):
            assert relative_error(ours, truth) <= 1.2 * relative_error(triton, truth) + 1e-4

    @pytest.mark.parametrize("tokens", [1, 4, 60, 64, 67, 68, 124, 128, 132, 188, 192, 196, 256, 999, 1000, 2052])
    def test_any_length(self, tokens: int) -> None:
        self.check(self.given(tokens))

    @pytest.mark.parametrize(("queries", "keys"), [(1, 65), (64, 700), (130, 131), (777, 2000)])
    def test_chunk_of_queries(self, queries: int, keys: int) -> None:
        self.check(self.given(queries, keys))

    @pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(3, 4, 1), (1, 1, 1), (2, 6, 2), (3, 4, 4)])
    def test_batches_and_key_heads(self, batch: int, heads: int, kv_heads: int) -> None:
        self.check(self.given(708, heads=heads, batch=batch, kv_heads=kv_heads))

    @pytest.mark.parametrize("lengths", [(1000,), (64, 128, 1), (7, 200, 63), (1, 1, 2, 700), (511, 2, 1)])
    def test_documents(self, lengths: tuple[int, ...]) -> None:
        for tokens, batch, heads, kv_heads in ((1000, 3, 4, 1), (2052, 1, 12, 4)):
            starts = documents(batch, tokens, *lengths)
            self.check(self.given(tokens, batch=batch, heads=heads, kv_heads=kv_heads, starts=starts), starts)

    def test_one_document_is_as_none(self) -> None:
        from andromeda.kernels import flash

        out, dout, lse, q, k, v = self.given(2000, batch=2, heads=12)
        _, delta = flash._dq(out, dout, lse, q, k, v, None, None, None, 0, None)
        one, other = (
            flash._dkv(dout, lse, delta, q, k, v, None, None, starts, 0, None)
            for starts in (None, documents(2, 2000, 2000))
        )
        assert all(map(torch.equal, one, other))

    @pytest.mark.parametrize("programs", [1, 60, 10**9])
    @pytest.mark.parametrize("tokens", [64, 320, 1500])
    def test_heads_that_share_a_program(self, programs: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
        from andromeda.kernels import flash

        monkeypatch.setattr(flash, "ENOUGH_PROGRAMS", programs)
        self.check(self.given(tokens, heads=12))

    def test_many_runs_are_bit_identical(self) -> None:
        given = self.given(9000, heads=12)
        first = self.gradients(given)
        for _ in range(20):
            assert all(map(torch.equal, self.gradients(given), first))

    @pytest.mark.parametrize(("tokens", "kernels"), [(300, ["dq", "dkv"]), (301, ["dq"])])
    def test_attention_goes_through_it(self, tokens: int, kernels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        from andromeda.kernels import flash

        seen: list[str] = []
        for name in ("dq", "dkv"):
            launch = getattr(flash, f"_launch_{name}_ring")

            def recorded(*arguments: Any, name: str = name, launch: Callable[..., None] = launch) -> None:
                seen.append(name)
                launch(*arguments)

            monkeypatch.setattr(flash, f"_launch_{name}_ring", recorded)
        with attention_backend("triton"):
            run(attention, inputs(tokens, 4, 128), geometry(4, 2, 128), torch.bfloat16)
        assert seen == kernels


SMALL_CASE = """
import torch
from andromeda.kernels import flash
from tests.kernels.test_flash_gpu import geometry, inputs, run
for dim_head in (64, 128):
    run(flash.flash_attention, inputs(150, 2, dim_head), geometry(2, 1, dim_head), torch.bfloat16)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SMALL_CASE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if tool == "racecheck" and result.returncode == 9 and has_hopper_gluon(torch.device("cuda")):
        from andromeda.kernels.flash_hopper import ring_forward_kernel
        from andromeda.kernels.flash_hopper_backward import ring_dkv_kernel, ring_dq_kernel

        assert races(result.stdout, [ring_forward_kernel, ring_dq_kernel, ring_dkv_kernel]) == []
        return
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
