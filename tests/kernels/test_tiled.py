"""The tiled and the short path against the dense reference: forward, gradients, precision, memory, what is skipped.

The bar is FlashAttention's: against a float64 truth, at most twice the error of plain PyTorch in the same precision.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from andromeda.kernels import BACKENDS, Geometry, Rotary, attention, tiled
from andromeda.kernels.reference import reference_attention
from andromeda.kernels.rotation import relative_table
from andromeda.kernels.short import MAX_KEYS, is_short, short_attention
from andromeda.kernels.tiled import tiled_attention
from tests.quick import quick

Attention = Callable[[Tensor, Tensor, Tensor, Geometry], Tensor]

HEADS, DIM_HEAD = 4, 4
NO_LIMIT = 2**31 - 1


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles and chunks at small lengths, of sizes that do not divide each other."""
    monkeypatch.setattr(tiled, "QUERY_TILE", 16)
    monkeypatch.setattr(tiled, "KEY_CHUNK", 24)


@dataclass(frozen=True)
class Case:
    """The default model's flags, in small; the tests flip them."""

    kv_heads: int = 1
    rotated_heads: int = 2
    xpos_scale: float | None = 40.0
    interpolation: float = 1.0
    alibi_heads: int = 2
    windowed: bool = True
    bounded: bool = True
    normalised: bool = True
    documents: int = 1

    def geometry(self, keys: int, batch: int) -> Geometry:
        slopes = torch.tensor([0.5, 0.0625, 0.25, 0.125][: self.alibi_heads] + [0.0] * (HEADS - self.alibi_heads))
        windows = torch.tensor([11, 70, 35, 300][: self.alibi_heads] + [NO_LIMIT] * (HEADS - self.alibi_heads))
        rotary = Rotary(self.rotated_heads, DIM_HEAD // 2, 10000.0, self.interpolation, self.xpos_scale)
        borders = torch.linspace(0, keys, self.documents + 1).long()[:-1]
        shifted = torch.stack([(borders + 5 * row * (borders > 0)).clamp(max=keys - 1) for row in range(batch)])
        index = torch.arange(keys)
        starts = torch.where(shifted[:, None] <= index[:, None], shifted[:, None], 0).amax(-1)
        return Geometry(
            slopes=slopes if self.alibi_heads else None,
            windows=windows if self.windowed else None,
            bounds=torch.full((HEADS,), math.sqrt(DIM_HEAD)) if self.bounded else None,
            starts=starts if self.documents > 1 else None,
            rotary=rotary if self.rotated_heads else None,
        )

    def inputs(self, queries: int, keys: int, batch: int, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v and the output's gradient: the same numbers for every dtype, those of bfloat16."""
        torch.manual_seed(keys + queries)
        q = torch.randn(batch, queries, HEADS, DIM_HEAD)
        k, v = torch.randn(2, batch, keys, self.kv_heads, DIM_HEAD)
        if self.normalised:
            q = math.sqrt(DIM_HEAD) * torch.nn.functional.normalize(q, dim=-1)
            k = torch.nn.functional.normalize(k, dim=-1)
        return [x.bfloat16().to(dtype) for x in (q, k, v, torch.randn(batch, queries, HEADS, DIM_HEAD))]


CASES = {
    "default": Case(),
    "multi_head": Case(kv_heads=HEADS),
    "grouped": Case(kv_heads=2),
    "no_rotary": Case(rotated_heads=0),
    "rotary_all": Case(rotated_heads=HEADS),
    "no_xpos": Case(xpos_scale=None),
    "steep_xpos": Case(xpos_scale=2.0),
    "interpolated": Case(interpolation=4.0, rotated_heads=HEADS),
    "no_alibi": Case(alibi_heads=0, windowed=False),
    "alibi_all": Case(alibi_heads=HEADS),
    "no_windows": Case(windowed=False),
    "no_bounds": Case(bounded=False),
    "no_qk_norm": Case(bounded=False, normalised=False, windowed=False),
    "packed": Case(documents=4),
    "packed_multi_head_rotary_all": Case(documents=4, kv_heads=HEADS, rotated_heads=HEADS, bounded=False),
}


def differentiated(path: Attention, inputs: list[Tensor], geometry: Geometry) -> dict[str, Tensor]:
    """The output, and the gradients of q, k and v for the output gradient inputs[3]."""
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs[:3])
    out = path(q, k, v, geometry)
    out.backward(inputs[3])
    assert q.grad is not None
    assert k.grad is not None
    assert v.grad is not None
    return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


@functools.cache
def truth(case: Case, queries: int, keys: int, batch: int) -> dict[str, Tensor]:
    return differentiated(
        reference_attention, case.inputs(queries, keys, batch, torch.float64), case.geometry(keys, batch)
    )


@functools.cache
def plain_errors(case: Case, queries: int, keys: int, batch: int, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """How far the dense path in `dtype` is from the truth."""
    plain = differentiated(reference_attention, case.inputs(queries, keys, batch, dtype), case.geometry(keys, batch))
    return errors(plain, truth(case, queries, keys, batch))


def errors(results: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """The largest and the root mean square of each result's errors."""
    wrong = {name: results[name].double() - exact[name] for name in exact}
    return {name: (x.abs().max().item(), x.square().mean().sqrt().item()) for name, x in wrong.items()}


def check(
    path: Attention, case: Case, queries: int, keys: int, dtype: torch.dtype, batch: int = 2, times: float = 2.0
) -> None:
    """Asserts that errors are at most twice those of plain PyTorch, the largest at most `times`.

    A few roundings of float32 are allowed for where plain PyTorch happens to have none.
    """
    inputs = case.inputs(queries, keys, batch, dtype)
    ours = differentiated(path, inputs, case.geometry(keys, batch))
    assert all(tensor.dtype == dtype for tensor in ours.values())
    dense = replace(case, bounded=False)  # the dense path does not look at bounds
    plain, exact = plain_errors(dense, queries, keys, batch, dtype), truth(dense, queries, keys, batch)
    for name, (largest, typical) in errors(ours, exact).items():
        spare = 4 * torch.finfo(torch.float32).eps * max(x.abs().max().item() for x in (exact[name], *inputs))
        assert largest <= times * plain[name][0] + spare, f"{name}: {largest:.1e}, plain PyTorch {plain[name][0]:.1e}"
        assert typical <= 2 * plain[name][1] + spare, f"{name}: {typical:.1e}, plain PyTorch {plain[name][1]:.1e}"


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@DTYPES
@pytest.mark.parametrize("length", quick([1, 63, 111], [1, 111]))
@pytest.mark.parametrize("name", CASES)
def test_within_twice_the_error_of_plain_pytorch(name: str, length: int, dtype: torch.dtype) -> None:
    check(tiled_attention, CASES[name], length, length, dtype)


@DTYPES
@pytest.mark.parametrize("name", quick(CASES, ["default", "no_qk_norm", "packed_multi_head_rotary_all"]))
def test_the_same_at_a_thousand_tokens(name: str, dtype: torch.dtype) -> None:
    check(tiled_attention, CASES[name], 1000, 1000, dtype, batch=1)


@pytest.mark.usefixtures("small_tiles")
@DTYPES
@pytest.mark.parametrize("lengths", [(111, 111), (17, 111), (1, 111)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_same_across_many_tiles(name: str, lengths: tuple[int, int], dtype: torch.dtype) -> None:
    """And for the last queries of a sequence whose first were computed before."""
    check(tiled_attention, CASES[name], *lengths, dtype)


@DTYPES
@pytest.mark.parametrize(
    "lengths", quick([(1, 1), (63, 63), (111, 111), (17, 111), (1, 111)], [(1, 1), (63, 63), (17, 111)]), ids=str
)
@pytest.mark.parametrize("name", CASES)
def test_short_path_within_twice_the_error(name: str, lengths: tuple[int, int], dtype: torch.dtype) -> None:
    """It rounds as often as plain PyTorch, at other places, so its one largest error may be thrice as large."""
    if is_short(lengths[1], CASES[name].geometry(lengths[1], 1)):
        check(short_attention, CASES[name], *lengths, dtype, times=3.0)
    else:
        assert name == "steep_xpos"


@pytest.mark.parametrize("path", [tiled_attention, short_attention])
@pytest.mark.parametrize("name", sorted(set(CASES) - {"steep_xpos"}))
def test_float64_is_exact(name: str, path: Attention) -> None:
    """No float32 hides inside: the paths differ by roundings of float64."""
    case = CASES[name]
    inputs, geometry = case.inputs(150, 150, 2, torch.float64), case.geometry(150, 2)
    ours = differentiated(path, inputs, geometry)
    for key, exact in differentiated(reference_attention, inputs, geometry).items():
        torch.testing.assert_close(ours[key], exact, rtol=1e-11, atol=1e-11)


@st.composite
def any_attention(draw: st.DrawFn) -> tuple[list[Tensor], Geometry, int, int]:
    """Inputs, geometry and sizes of tile and chunk, of any kind."""
    heads, kv_heads = draw(st.sampled_from([(1, 1), (3, 1), (4, 2), (3, 3)]))
    pairs = draw(st.integers(1, 3))
    keys = draw(st.integers(1, 60))
    queries, batch = draw(st.integers(1, keys)), draw(st.integers(1, 2))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    scale = draw(st.sampled_from([0.1, 1.0, 30.0]))
    shapes = [(queries, heads), (keys, kv_heads), (keys, kv_heads), (queries, heads)]
    inputs = [torch.randn(batch, t, h, 2 * pairs, dtype=torch.float64) for t, h in shapes]
    inputs[0] = inputs[0] * scale
    bound = (inputs[0].norm(dim=-1).amax() * inputs[1].norm(dim=-1).amax()).item()
    whole = st.integers(1, keys)
    rotary = Rotary(
        heads=draw(st.integers(0, heads)),
        pairs=pairs,
        base=draw(st.sampled_from([1.0, 10000.0])),
        interpolation=draw(st.sampled_from([0.5, 1.0, 8.0])),
        xpos_scale=draw(st.sampled_from([None, 0.05, 5.0, 512.0])),
    )
    starts = torch.tensor([[draw(st.booleans()) for _ in range(keys)] for _ in range(batch)])
    starts = torch.where(starts, torch.arange(keys), 0).cummax(1).values
    slopes = [draw(st.sampled_from([0.0, 0.004, 0.5, 3.0])) for _ in range(heads)]
    windows = [draw(st.one_of(whole, st.just(NO_LIMIT))) for _ in range(heads)]
    geometry = Geometry(
        slopes=draw(st.sampled_from([None, torch.tensor(slopes, dtype=torch.float64)])),
        windows=draw(st.sampled_from([None, torch.tensor(windows)])),
        bounds=draw(st.sampled_from([None, torch.full((heads,), bound)])),
        starts=draw(st.sampled_from([None, starts])),
        rotary=draw(st.sampled_from([None, rotary])),
    )
    return inputs, geometry, draw(st.integers(1, 70)), draw(st.integers(1, 70))


@settings(max_examples=60)
@given(any_attention())
def test_any_geometry(drawn: tuple[list[Tensor], Geometry, int, int]) -> None:
    inputs, geometry, tile, chunk = drawn
    exact = differentiated(reference_attention, inputs, geometry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled, "QUERY_TILE", tile)
        patch.setattr(tiled, "KEY_CHUNK", chunk)
        for path in (
            (tiled_attention, short_attention) if is_short(inputs[1].shape[1], geometry) else (tiled_attention,)
        ):
            ours = differentiated(path, inputs, geometry)
            for name in exact:
                torch.testing.assert_close(ours[name], exact[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk", [3, 64])
@pytest.mark.parametrize("tile", [2, 5, 64])
def test_every_pair_of_windows_at_every_length(tile: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heads that walk together, and each edge of a window at each edge of a tile and a chunk."""
    monkeypatch.setattr(tiled, "QUERY_TILE", tile)
    monkeypatch.setattr(tiled, "KEY_CHUNK", chunk)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 7, 2, 2, dtype=torch.float64)
    for keys in range(1, 8):
        for windows in itertools.product(range(1, keys + 1), repeat=2):
            geometry = Geometry(windows=torch.tensor(windows))
            inputs = q[:, :keys], k[:, :keys, :1], v[:, :keys, :1]
            exact = reference_attention(*inputs, geometry)
            torch.testing.assert_close(tiled_attention(*inputs, geometry), exact, rtol=1e-11, atol=1e-11)


def test_gradcheck_across_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "QUERY_TILE", 3)
    monkeypatch.setattr(tiled, "KEY_CHUNK", 4)
    case = replace(CASES["packed"], documents=2)
    geometry = replace(case.geometry(7, 1), windows=torch.tensor([2, 4, NO_LIMIT, NO_LIMIT]))
    q, k, v = (x.requires_grad_() for x in case.inputs(5, 7, 1, torch.float64)[:3])
    assert torch.autograd.gradcheck(lambda q, k, v: tiled_attention(q, k, v, geometry), (q, k, v), fast_mode=True)


class TestDispatch:
    def keys_taken_short(self, geometry: Geometry, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        taken: list[int] = []

        def spy(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry) -> Tensor:
            taken.append(k.shape[1])
            return short_attention(q, k, v, geometry)

        monkeypatch.setitem(BACKENDS, "short", spy)
        for keys in (1, 2, 30, 31, 32, MAX_KEYS, MAX_KEYS + 1):
            x = torch.zeros(1, keys, HEADS, DIM_HEAD)
            attention(x, x, x, geometry)
        return taken

    def test_few_keys_take_the_short_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.keys_taken_short(Geometry(), monkeypatch) == [1, 2, 30, 31, 32, MAX_KEYS]

    def test_unless_a_key_ahead_of_the_first_would_grow_too_large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """exp(8) is the most that xPos may scale a key by: some 31 tokens of zeta = 0.4/1.4 every 5 tokens."""
        rotary = Rotary(2, DIM_HEAD // 2, xpos_scale=5.0)
        assert self.keys_taken_short(Geometry(rotary=rotary), monkeypatch) == [1, 2, 30, 31]

    def test_the_short_path_refuses_many_keys(self) -> None:
        x = torch.zeros(1, MAX_KEYS + 1, 1, DIM_HEAD)
        with pytest.raises(ValueError, match=f"{MAX_KEYS + 1} keys are too many"):
            short_attention(x, x, x, Geometry())


def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    case = CASES["default"]
    q, k, v, dout = case.inputs(5, 5, 1, torch.float64)
    q.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(tiled_attention(q, k, v, case.geometry(5, 1)), q, dout, create_graph=True)


class TestExtremes:
    """Logits at the ends of what the two softmax forms must carry, in float32."""

    @pytest.mark.usefixtures("small_tiles")
    @pytest.mark.parametrize("bound", [39.9, 40.0, 40.1, 200.0, 10_000.0])
    @pytest.mark.parametrize("sign", [-1.0, 1.0])
    @pytest.mark.parametrize("path", [tiled_attention, short_attention])
    def test_every_logit_at_its_bound(self, bound: float, sign: float, path: Attention) -> None:
        """Below MAX_BOUND_WITHOUT_MAXIMUM the running maximum is left out; far beyond it exp would overflow."""
        torch.manual_seed(0)
        unit = torch.full((1, 100, 2, DIM_HEAD), DIM_HEAD**-0.5)
        v, dout = torch.randn(1, 100, 1, DIM_HEAD), torch.randn(1, 100, 2, DIM_HEAD)
        inputs = [bound * unit, sign * unit[:, :, :1], v, dout]
        geometry = Geometry(slopes=torch.tensor([1.0, 0.0]), bounds=torch.full((2,), bound))
        exact = differentiated(reference_attention, [x.double() for x in inputs], geometry)
        rounding = torch.finfo(torch.float32).eps * bound  # of a logit in float32, hence relative of a probability
        for name, (error, _) in errors(differentiated(path, inputs, geometry), exact).items():
            assert error <= 10 * rounding * (bound if name == "dk" else 1.0)  # dk carries q

    @pytest.mark.usefixtures("small_tiles")
    def test_only_the_farthest_key_counts(self) -> None:
        """Near keys at -B, the first at +B: the sum starts with what later chunks dwarf, or the other way round."""
        q = torch.zeros(1, 1, 2, DIM_HEAD)
        k = torch.zeros(1, 100, 1, DIM_HEAD)
        v = torch.randn(1, 100, 1, DIM_HEAD)
        q[..., 0], k[..., 0] = 40.0, -1.0
        k[:, 0, :, 0] = 1.0
        for bounds in (torch.full((2,), 40.0), None):
            out = tiled_attention(q, k, v, Geometry(bounds=bounds))
            torch.testing.assert_close(out, v[:, :1].expand_as(out))

    def test_bounds_of_different_heads_do_not_mix(self) -> None:
        case = CASES["no_qk_norm"]
        inputs, geometry = case.inputs(70, 70, 1, torch.float32), case.geometry(70, 1)
        inputs[0] = inputs[0] * torch.tensor([1.0, 50.0, 1.0, 50.0])[:, None]  # up to 1,000
        mixed = replace(geometry, bounds=torch.tensor([40.0, 4000.0, 40.0, 4000.0]))
        q, k, v, _ = inputs
        exact = reference_attention(q.double(), k.double(), v.double(), geometry)
        torch.testing.assert_close(tiled_attention(q, k, v, mixed).double(), exact, rtol=1e-3, atol=1e-4)


class TestWhatIsSkipped:
    @pytest.mark.parametrize("by", ["windows", "documents"])
    def test_keys_out_of_reach_are_never_read(self, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Keys and values beyond the longest window, or in documents gone by, hold NaN: none comes out."""
        monkeypatch.setattr(tiled, "QUERY_TILE", 16)
        case = Case(alibi_heads=HEADS, windowed=False, documents=3 if by == "documents" else 1)
        queries, keys = 20, 600
        geometry, unseen = case.geometry(keys, 1), 400  # where the third document begins
        if by == "windows":
            geometry, unseen = replace(geometry, windows=torch.tensor([5, 30, 60, 90])), keys - queries - 90 + 1
        inputs = case.inputs(queries, keys, 1, torch.float32)
        exact = differentiated(reference_attention, inputs, geometry)
        for x in inputs[1:3]:
            x[:, :unseen] = math.nan
        for name, tensor in differentiated(tiled_attention, inputs, geometry).items():
            torch.testing.assert_close(tensor, exact[name], rtol=1e-4, atol=1e-5)

    def test_work_in_windows_grows_with_the_length_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Counted in elements put out; without windows it grows with the square."""
        monkeypatch.setattr(tiled, "QUERY_TILE", 16)
        monkeypatch.setattr(tiled, "KEY_CHUNK", 32)
        growth = {}
        for windows in (torch.tensor([5, 12, 20, 31]), None):
            work = []
            for length in (180, 360):
                case = Case(alibi_heads=HEADS)
                inputs = case.inputs(length, length, 1, torch.float32)
                geometry = replace(case.geometry(length, 1), windows=windows)
                with _Elements() as count:
                    differentiated(tiled_attention, inputs, geometry)
                work.append(count.total)
            growth[windows is not None] = work[1] / work[0]
        assert growth[True] < 2.1
        assert growth[False] > 3

    @pytest.mark.parametrize("queries", [1, 500])
    def test_gradients_of_unseen_keys_are_zero(self, queries: int) -> None:
        case = Case(alibi_heads=HEADS)
        geometry = replace(case.geometry(600, 1), windows=torch.full((HEADS,), 20))
        grads = differentiated(tiled_attention, case.inputs(queries, 600, 1, torch.float32), geometry)
        unseen = 600 - queries - 19
        for name in ("dk", "dv"):
            assert (grads[name][:, :unseen] == 0).all()
            assert (grads[name][:, unseen:] != 0).any(-1).all()


class _Elements(TorchDispatchMode):
    """Of all tensors that operations put out: how many in all, and in the largest."""

    total = largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.total += tensor.numel()
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ["default", "packed", "multi_head"])
def test_no_tensor_grows_with_the_square_of_the_length(name: str) -> None:
    case, length = CASES[name], 250
    inputs, geometry = case.inputs(length, length, 1, torch.float32), case.geometry(length, 1)
    with _Elements() as count:
        differentiated(tiled_attention, inputs, geometry)
    tables, queries = 3 * length * DIM_HEAD, length * HEADS * DIM_HEAD
    assert count.largest <= max(tables, queries, HEADS * tiled.QUERY_TILE * tiled.KEY_CHUNK) < length * length / 10


@DTYPES
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    """What is float32 inside stays so: products in bfloat16 would miss the bar above."""
    case = CASES["default"]
    inputs, geometry = case.inputs(70, 70, 1, dtype), case.geometry(70, 1)
    expected = differentiated(tiled_attention, inputs, geometry)
    with torch.autocast("cpu", torch.bfloat16):
        ours = differentiated(tiled_attention, inputs, geometry)
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("path", [tiled_attention, short_attention])
def test_evaluation_before_training(path: Attention) -> None:
    """The cached rotary tables, first made in inference mode, serve a backward pass as well."""
    case = CASES["default"]
    inputs, geometry = case.inputs(33, 33, 1, torch.float32), case.geometry(33, 1)
    expected = differentiated(path, inputs, geometry)
    relative_table.cache_clear()
    with torch.inference_mode():
        q, k, v, _ = inputs
        torch.testing.assert_close(path(q, k, v, geometry), expected["out"])
    for name, tensor in differentiated(path, inputs, geometry).items():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize("path", [tiled_attention, short_attention])
def test_inputs_need_not_be_contiguous_and_are_left_alone(path: Attention) -> None:
    case = CASES["default"]
    inputs, geometry = case.inputs(40, 40, 2, torch.float32), case.geometry(40, 2)
    strided = [x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for x in inputs]
    assert not strided[0].is_contiguous()
    before = [x.clone() for x in strided]
    ours = differentiated(path, strided, geometry)
    for name, tensor in differentiated(path, inputs, geometry).items():
        torch.testing.assert_close(ours[name], tensor)
    for x, was in zip(strided, before, strict=True):
        assert torch.equal(x, was)


@pytest.mark.parametrize("path", [tiled_attention, short_attention])
def test_only_the_gradients_that_are_asked_for(path: Attention) -> None:
    case = CASES["default"]
    q, k, v, dout = case.inputs(40, 40, 1, torch.float32)
    v.requires_grad_()
    path(q, k, v, case.geometry(40, 1)).backward(dout)
    assert v.grad is not None
    assert q.grad is k.grad is None
