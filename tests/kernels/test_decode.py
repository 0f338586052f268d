"""Decode in Triton against the plain reference: without a GPU under Triton's interpreter, with one in earnest.

The bar on a GPU is FlashAttention's: against a float64 truth, at most twice the error of plain PyTorch in the same
precision. The interpreter's products are right in float32 alone, so there the bar is float32's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from andromeda.cache import Cache
from andromeda.config import preset
from andromeda.kernels import BACKENDS, Geometry, Rotary, attention, attention_backend, choose_backend, dispatch
from andromeda.kernels.paged import as_pages, decode_reference, gather_pages, whole_buffer
from andromeda.kernels.reference import reference_attention
from andromeda.model import Andromeda
from tests.kernels.paged_batches import CASES, NO_LIMIT, Case, assert_equal, batch_of
from tests.quick import quick

pytest.importorskip("triton")
import triton
import triton.language as tl

from andromeda.kernels import decode, decode_kernels
from andromeda.kernels.decode import DecodeConfig, decode_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")
interpreted = pytest.mark.skipif(not decode.INTERPRETED, reason="the gpu tests ask the same of the compiled kernel")


@triton.jit
def turn_ones(distance_ptr, turns_ptr, cos_ptr, sin_ptr):
    """(1, 0) rotated as queries are, for 16 pairs and 4 distances."""
    pair, row = tl.arange(0, 16), tl.arange(0, 4)
    one = tl.full([4, 16], 1.0, tl.float32)
    distance = tl.load(distance_ptr + row)[:, None]
    cos, sin = decode_kernels._turned(
        one, 0.0 * one, distance, tl.load(turns_ptr + pair), tl.zeros([16], tl.float32), True
    )
    at = row[:, None] * 16 + pair[None, :]
    tl.store(cos_ptr + at, cos)
    tl.store(sin_ptr + at, sin)


SEEN_WITH_ONE_TOKEN = ["grouped", "bounded"]
RAGGED = quick(
    [*((name, 3) for name in CASES), ("default", 1), ("grouped", 1), ("bounded", 1)],
    [*((name, 3) for name in CASES if name not in SEEN_WITH_ONE_TOKEN), ("grouped", 1), ("bounded", 1)],
)


@interpreted
class TestEqualsTheReference:
    @pytest.mark.parametrize("one", RAGGED, ids=str)
    def test_ragged_batch(self, one: tuple[str, int]) -> None:
        name, new = one
        case = CASES[name]
        batch, geometry = batch_of([81, 5, 66], new, case, torch.float32), case.with_rotary(32)
        assert_equal(decode_attention(*batch, geometry), batch, geometry)

    @pytest.mark.parametrize("name", ["default", "bounded"])
    @pytest.mark.parametrize("length", [1, 17, 64, 127])
    def test_lengths_around_tiles_and_pages(self, length: int, name: str) -> None:
        case = CASES[name]
        batch, geometry = batch_of([length], 1, case, torch.float32), case.with_rotary(32)
        assert_equal(decode_attention(*batch, geometry), batch, geometry)

    @pytest.mark.parametrize(("dim_head", "page_size"), [(64, 64), (128, 256)])
    def test_sizes_of_heads_and_pages(self, dim_head: int, page_size: int) -> None:
        case = CASES["default"]
        batch = batch_of([201, 300], 2, case, torch.float32, dim_head, page_size)
        geometry = case.with_rotary(dim_head)
        assert_equal(decode_attention(*batch, geometry), batch, geometry)

    def test_bounds_decide_on_the_running_maximum(self) -> None:
        """A logit of 500 overflows without; so a head that may have one, however small its neighbours', has it."""
        batch = batch_of([97], 1, CASES["bounded"], torch.float32)
        batch = batch._replace(q=90 * batch.q)
        geometry = CASES["bounded"].with_rotary(32)
        assert not decode_attention(*batch, geometry).isfinite().all()
        bounds = torch.tensor([5.7, 5.7, 5.7, 520.0], dtype=torch.float64)
        assert_equal(decode_attention(*batch, replace(geometry, bounds=bounds)), batch, geometry, tolerance=3e-5)

    def test_float16_has_no_room_without_the_running_maximum(self) -> None:
        case = Case(alibi_heads=0, windowed=False, rotated_heads=0, bound=11.4)
        batch, geometry = batch_of([40], 1, case, torch.float16, 128), case.with_rotary(128)
        batch = batch._replace(k_pages=torch.where(batch.k_pages.isnan(), batch.k_pages, batch.q[0, 0, 0] / 11.32))
        assert_equal(decode_attention(*batch, geometry), batch, geometry, tolerance=3e-3)

    def test_many_new_tokens_in_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decode, "MAX_ROWS", 10)  # 5 tokens of two heads
        case = CASES["default"]
        batch, geometry = batch_of([40, 8, 33], 8, case, torch.float32), case.with_rotary(32)
        assert_equal(decode_attention(*batch, geometry), batch, geometry)

    @pytest.mark.parametrize("name", ["default", "steep_xpos"])
    def test_half_precision_in_and_out(self, name: str) -> None:
        """Decay stays in its range: the last tile's anchor is the last key, not the tile's end."""
        case = CASES[name]
        batch, geometry = batch_of([70, 130], 1, case, torch.float16), case.with_rotary(32)
        assert_equal(decode_attention(*batch, geometry), batch, geometry, tolerance=3e-3)

    @pytest.mark.parametrize(("programs", "costs"), [(1, (1, 1)), (3, (2, 5)), (40, (1, 1))])
    def test_however_the_work_is_shared_out(
        self, programs: int, costs: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One program for all, units cut anywhere, more programs than tiles."""
        monkeypatch.setattr(decode, "_multiprocessors", lambda device: programs)
        config = DecodeConfig(block=16, residency=1, far=costs[0], near=costs[1])
        monkeypatch.setattr(decode, "choose_config", lambda *_: config)
        case = replace(CASES["grouped_across_the_sets"], alibi_heads=2)
        batch, geometry = batch_of([100, 1, 40], 1, case, torch.float32), case.with_rotary(32)
        assert_equal(decode_attention(*batch, geometry), batch, geometry)

    def test_angles_at_a_million_tokens(self) -> None:
        distance = torch.tensor([0, 1, -3, 1_000_003])
        turns = Rotary(1, 16).rates() / (2 * math.pi)
        cos, sin = torch.empty(2, 4, 16)
        turn_ones[(1,)](distance.int(), turns, cos, sin)
        exact = torch.polar(torch.ones(4, 16, dtype=torch.float64), 2 * math.pi * turns * distance[:, None])
        torch.testing.assert_close(cos.double(), exact.real, rtol=0, atol=1e-6)
        torch.testing.assert_close(sin.double(), exact.imag, rtol=0, atol=1e-6)

    @settings(max_examples=6)
    @given(data=st.data())
    def test_any_batch(self, data: st.DataObject) -> None:
        """Lengths of 0 and below the new tokens too: queries that stand nowhere give zeros."""
        heads, kv_heads = data.draw(st.sampled_from([(1, 1), (3, 1), (4, 2), (3, 3)]))
        case = Case(
            heads=heads,
            kv_heads=kv_heads,
            rotated_heads=data.draw(st.integers(0, heads)),
            alibi_heads=data.draw(st.integers(0, heads)),
            xpos_scale=data.draw(st.sampled_from([None, 5.0, 512.0])),
            interpolation=data.draw(st.sampled_from([0.5, 8.0])),
            local_heads=data.draw(st.sampled_from([None, *range(heads + 1)])),
            bound=data.draw(st.sampled_from([None, 5.7])),
        )
        windows = [data.draw(st.one_of(st.integers(1, 50), st.just(NO_LIMIT))) for _ in range(heads)]
        geometry = replace(case.with_rotary(32), windows=torch.tensor(windows))
        lengths = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=3).filter(any))
        batch = batch_of(lengths, data.draw(st.integers(1, 4)), case, torch.float32)
        assert_equal(decode_attention(*batch, geometry), batch, geometry)


@interpreted
class TestWhatIsRead:
    def test_keys_before_every_window_are_not_used(self) -> None:
        case = Case(alibi_heads=4)
        batch, geometry = batch_of([130, 90], 1, case, torch.float32), case.with_rotary(32)
        exact = decode_reference(*batch.to(torch.float64), geometry)
        for row, length in enumerate(batch.lengths.tolist()):
            j = torch.arange(length - 70)  # the longest window
            batch.k_pages[batch.page_table[row, j // 16].long(), j % 16] = math.nan
            batch.v_pages[batch.page_table[row, j // 16].long(), j % 16] = math.nan
        torch.testing.assert_close(decode_attention(*batch, geometry).double(), exact, rtol=1e-5, atol=1e-5)

    def test_inputs_need_not_be_contiguous_and_are_left_alone(self) -> None:
        case = CASES["grouped"]
        batch, geometry = batch_of([60, 33], 2, case, torch.float32, spare=0), case.with_rotary(32)
        strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (batch.q, batch.k_pages, batch.v_pages)]
        backwards = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (batch.q, batch.k_pages, batch.v_pages)]
        expected = decode_attention(*batch, geometry)
        for q, k, v in (strided, backwards):
            before = [x.clone() for x in (q, k, v)]
            assert torch.equal(decode_attention(q, k, v, batch.page_table, batch.lengths, geometry), expected)
            for x, was in zip((q, k, v), before, strict=True):
                torch.testing.assert_close(x, was, rtol=0, atol=0, equal_nan=True)

    def test_two_runs_are_the_same(self) -> None:
        case = CASES["default"]
        batch, geometry = batch_of([97, 130], 1, case, torch.float32), case.with_rotary(32)
        assert torch.equal(decode_attention(*batch, geometry), decode_attention(*batch, geometry))


@interpreted
def test_custom_operator() -> None:
    case = CASES["default"]
    batch, geometry = batch_of([40, 17], 1, case, torch.float32), case.with_rotary(32)
    arguments = (*batch, geometry.slopes, geometry.windows, None, 2, 2, 10000.0, 1.0, 40.0)
    torch.library.opcheck(torch.ops.andromeda.decode_attention.default, arguments)


class TestAsPages:
    def test_a_view_of_the_cache(self) -> None:
        cache = torch.randn(3, 64, 2, 4)
        pages, table = as_pages(cache, 16)
        assert pages.data_ptr() == cache.data_ptr()
        for row in range(3):
            assert torch.equal(gather_pages(pages, table[row], 37), cache[row, :37])

    def test_room_that_pages_do_not_divide(self) -> None:
        with pytest.raises(ValueError, match="a multiple of 16"):
            as_pages(torch.zeros(1, 40, 1, 4), 16)

    def test_part_of_a_larger_cache(self) -> None:
        with pytest.raises(ValueError, match="back to back"):
            as_pages(torch.zeros(2, 64, 1, 4)[:, :32], 16)


class TestReference:
    def test_pages_are_put_in_order(self) -> None:
        case = CASES["default"]
        batch, geometry = batch_of([40], 3, case, torch.float64, dim_head=4), case.with_rotary(4)
        k, v = (gather_pages(pages, batch.page_table[0], 40)[None] for pages in (batch.k_pages, batch.v_pages))
        assert torch.equal(decode_reference(*batch, geometry), reference_attention(batch.q, k, v, geometry))


class TestErrors:
    CASE = Case()

    def refused(self, message: str, geometry: Geometry | None = None, **changed: Tensor) -> None:
        batch = batch_of([20, 5], 1, self.CASE, torch.float16)._replace(**changed)
        with pytest.raises(ValueError, match=message):
            decode_attention(*batch, geometry or self.CASE.with_rotary(32))

    def test_shapes(self) -> None:
        self.refused("4 dimensions", q=torch.zeros(2, 4, 32))
        self.refused("dim_head must agree", q=torch.zeros(2, 1, 4, 64))
        self.refused("power of two of tokens", k_pages=torch.zeros(2, 24, 1, 32), v_pages=torch.zeros(2, 24, 1, 32))
        self.refused("power of two of tokens", k_pages=torch.zeros(2, 8, 1, 32), v_pages=torch.zeros(2, 8, 1, 32))
        self.refused("page table must be", page_table=torch.zeros(3, 2, dtype=torch.int32))
        self.refused("page table must be", lengths=torch.zeros(3, dtype=torch.int32))
        self.refused("slopes must be", Geometry(slopes=torch.zeros(3)))
        self.refused("does not fit", Geometry(rotary=Rotary(2, 8)))

    def test_types(self) -> None:
        self.refused("must be int32", lengths=torch.zeros(2, dtype=torch.int64))
        self.refused("of one type", q=torch.zeros(2, 1, 4, 32, dtype=torch.float64))
        self.refused("of one type", q=torch.zeros(2, 1, 4, 32, dtype=torch.bfloat16))

    def test_what_the_kernel_does_not_take(self) -> None:
        half: dict[str, Any] = {"dtype": torch.float16}
        pages = torch.zeros(2, 16, 1, 16, **half)
        self.refused(
            "dim_head must be one of", Geometry(), q=torch.zeros(2, 1, 4, 16, **half), k_pages=pages, v_pages=pages
        )
        self.refused("1 to 16 new tokens", q=torch.zeros(2, 17, 4, 32, **half))
        self.refused("steep decay", Geometry(rotary=Rotary(2, 16, xpos_scale=0.5)), q=torch.zeros(2, 8, 4, 32, **half))
        self.refused("one document", Geometry(starts=torch.zeros(2, 20)))


# -- with a GPU: make test-gpu

MODEL = Case(heads=24, rotated_heads=12, alibi_heads=12, xpos_scale=512.0)
ON_GPU = {
    "default": MODEL,
    "grouped": replace(MODEL, kv_heads=8),
    "rotary_all": replace(MODEL, rotated_heads=24),
    "rotary_all_local_heads_known": replace(MODEL, rotated_heads=24, local_heads=12),
    "no_rotary": replace(MODEL, rotated_heads=0, local_heads=12),
    "no_windows": replace(MODEL, windowed=False),
    "no_xpos": replace(MODEL, xpos_scale=None),
    "bounded": replace(MODEL, bound=11.4),
}
RING = replace(MODEL, bound=11.4, local_heads=12)  # decode_hopper.py's, on a Hopper GPU and for one sequence
RINGS = {
    "ring": RING,
    "ring_of_6_and_2_heads": replace(RING, heads=8, rotated_heads=6, alibi_heads=6, local_heads=6),
    "ring_no_xpos_interpolated": replace(RING, xpos_scale=None, interpolation=4.0),
    "ring_online": replace(RING, bound=60.0),
}
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)


def check_on_gpu(lengths: list[int], new: int, case: Case, dtype: torch.dtype, dim_head: int, page_size: int) -> None:
    batch = batch_of(lengths, new, case, dtype, dim_head, page_size, device="cuda")
    geometry = case.with_rotary(dim_head, "cuda")
    exact = decode_reference(*batch.to(torch.float64), geometry)
    ours, plain = (f(*batch, geometry).double() - exact for f in (decode_attention, decode_reference))
    spare = 4 * torch.finfo(torch.float32).eps * exact.abs().max().item()
    if not plain.isfinite().all():  # in float16 a slope times 131,072 tokens of distance overflows
        # Then ten roundings of float16 (2^-11), for each head: what a global one gives is a hundredth of a local one's.
        error, size = (x.square().mean((0, 1, 3)).sqrt() for x in (ours, exact))
        assert (error <= 5e-3 * size).all(), (error / size).tolist()
        return
    assert ours.abs().max().item() <= 2 * plain.abs().max().item() + spare
    assert ours.square().mean().sqrt().item() <= 2 * plain.square().mean().sqrt().item() + spare


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
    @pytest.mark.parametrize("length", [1, 63, 1000, 4096, 131072])
    @pytest.mark.parametrize("name", ON_GPU)
    def test_within_twice_the_error_of_plain_pytorch(self, name: str, length: int, dtype: torch.dtype) -> None:
        check_on_gpu([length], 1, ON_GPU[name], dtype, 128, 64)

    def test_a_million_tokens_without_windows(self) -> None:
        case = Case(heads=2, rotated_heads=1, xpos_scale=None, alibi_heads=0, windowed=False)
        check_on_gpu([1_000_003], 1, case, torch.float16, 128, 64)

    @pytest.mark.parametrize(("dim_head", "page_size"), [(32, 16), (64, 32), (128, 16), (128, 256)])
    @pytest.mark.parametrize("new", [1, 4, 16])
    def test_ragged_batches(self, new: int, dim_head: int, page_size: int) -> None:
        check_on_gpu([1000, 17, 4096, 333], new, MODEL, torch.bfloat16, dim_head, page_size)

    def test_two_runs_are_bit_identical(self) -> None:
        batch, geometry = (
            batch_of([5000, 131], 1, MODEL, torch.bfloat16, 128, 64, device="cuda"),
            MODEL.with_rotary(128, "cuda"),
        )
        first = decode_attention(*batch, geometry)
        for _ in range(10):
            assert torch.equal(decode_attention(*batch, geometry), first)

    def test_a_graph_replays_for_other_lengths(self) -> None:
        batch, geometry = (
            batch_of([4000, 3000], 1, MODEL, torch.bfloat16, 128, 64, device="cuda"),
            MODEL.with_rotary(128, "cuda"),
        )
        decode_attention(*batch, geometry)  # compiles, and makes the tables
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = decode_attention(*batch, geometry)
        for lengths in ([4000, 3000], [1, 2999], [63, 64], [0, 1234]):
            batch.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
            graph.replay()
            assert torch.equal(out, decode_attention(*batch, geometry))
            exact = decode_reference(*batch.to(torch.float64), geometry)
            torch.testing.assert_close(out.double(), exact, rtol=0.03, atol=0.03)


@pytest.mark.gpu
@on_hopper
class TestRing:
    @pytest.fixture(autouse=True)
    def taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The other kernel is not."""
        monkeypatch.setattr(decode, "decode_kernel", None)

    @pytest.mark.parametrize("length", [1, 63, 64, 1000, 8449, 131072, 200001])
    @pytest.mark.parametrize("name", RINGS)
    def test_within_twice_the_error_of_plain_pytorch(self, name: str, length: int) -> None:
        check_on_gpu([length], 1, RINGS[name], torch.bfloat16, 128, 64)

    @pytest.mark.parametrize("reach", [100, 9000, NO_LIMIT])
    def test_windows_of_many_tiles(self, reach: int) -> None:
        batch = batch_of([70001], 1, RING, torch.bfloat16, 128, 64, device="cuda")
        geometry = RING.with_rotary(128, "cuda")
        assert geometry.windows is not None and geometry.slopes is not None
        geometry.windows[3], geometry.slopes[3] = reach, 1e-4
        exact = decode_reference(*batch.to(torch.float64), geometry)
        ours, plain = (f(*batch, geometry).double() - exact for f in (decode_attention, decode_reference))
        assert ours.abs().max() <= 2 * plain.abs().max()

    def test_a_large_logit(self) -> None:
        """It overflows without the running maximum, which a head with a large bound has, and so have its neighbours."""
        batch = batch_of([5000], 1, RING, torch.bfloat16, 128, 64, device="cuda")
        batch = batch._replace(q=40 * batch.q)
        geometry = RING.with_rotary(128, "cuda")
        assert not decode_attention(*batch, geometry).isfinite().all()
        geometry = replace(geometry, bounds=torch.tensor([11.4] * 23 + [460.0], dtype=torch.float64, device="cuda"))
        exact = decode_reference(*batch.to(torch.float64), geometry)
        ours, plain = (f(*batch, geometry).double() - exact for f in (decode_attention, decode_reference))
        assert ours.abs().max() <= 2 * plain.abs().max()

    def test_two_runs_are_bit_identical(self) -> None:
        batch = batch_of([131072], 1, RING, torch.bfloat16, 128, 64, device="cuda")
        geometry = RING.with_rotary(128, "cuda")
        first = decode_attention(*batch, geometry)
        for _ in range(50):
            assert torch.equal(decode_attention(*batch, geometry), first)

    def test_a_graph_replays_for_other_lengths(self) -> None:
        batch = batch_of([20000], 1, RING, torch.bfloat16, 128, 64, device="cuda")
        geometry = RING.with_rotary(128, "cuda")
        decode_attention(*batch, geometry)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = decode_attention(*batch, geometry)
        for length in (20000, 19999, 8448, 65, 1, 0):
            batch.lengths.fill_(length)
            graph.replay()
            assert torch.equal(out, decode_attention(*batch, geometry))
            exact = decode_reference(*batch.to(torch.float64), geometry)
            torch.testing.assert_close(out.double(), exact, rtol=0.03, atol=0.03)


# -- through the model and its cache

MHA = {"attn_one_kv_head": False}


@interpreted
@pytest.mark.parametrize("flags", quick([{}, {"rotary_heads": "all"}, MHA], [{}, MHA]), ids=str)
def test_a_model_decodes_through_the_kernel(flags: dict[str, Any]) -> None:
    """Token by token and three at once, behind a prefill: the same as all at once."""
    config = preset("nano", num_tokens=50, max_seq_len=16, depth=2, dim=64, heads=4, alibi_num_heads=2, **flags)
    model, ids, cache = Andromeda(config).eval(), torch.randint(50, (2, 36)), Cache()
    with torch.inference_mode():
        expected = model(ids)
        parts = [model(ids[:, :31], cache=cache)]
        with attention_backend("decode"):
            parts += [model(part, cache=cache) for part in ids[:, 31:].split([1, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)


def test_a_decode_step_is_known_by_its_buffers() -> None:
    buffer = torch.zeros(2, 128, 1, 32)
    held, q, geometry = buffer[:, :100], torch.zeros(2, 1, 4, 32), Geometry()
    assert dispatch._is_decode_step(q, held, held, geometry)
    assert not dispatch._is_decode_step(torch.zeros(2, 17, 4, 32), held, held, geometry)
    assert not dispatch._is_decode_step(q, held.clone(), held.clone(), geometry)  # no whole pages
    assert not dispatch._is_decode_step(q.requires_grad_(), held, held, geometry)
    buffers = whole_buffer(held), whole_buffer(held[:1]), whole_buffer(held.clone()), whole_buffer(buffer[:, 64:])
    assert buffers[0] is not None and buffers[0].shape == buffer.shape
    assert buffers[1] is not None and buffers[1].shape == (1, 128, 1, 32)
    assert buffers[2] is None
    assert buffers[3] is None  # its rows run on past the end of the storage


def test_the_choice_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the flash kernels would run, for a decode step alone; a forced backend stays what it is."""
    monkeypatch.setattr(dispatch, "has_flash_kernels", lambda device: True)
    cpu, used = torch.device("cpu"), list[str]()
    assert choose_backend(cpu, torch.float16, 32, 100, Geometry(), step=True) == "decode"
    assert choose_backend(cpu, torch.float16, 32, 100, Geometry()) == "triton"
    assert choose_backend(cpu, torch.float16, 32, 100, Geometry(), step=True, flash=False) == "reference"
    assert choose_backend(cpu, torch.float32, 32, 100, Geometry(), step=True) == "short"

    def spy(name: str) -> Callable[..., Tensor]:
        def backend(q: Tensor, *_: Any) -> Tensor:
            used.append(name)
            return q

        return backend

    for name in ("triton", "decode"):
        monkeypatch.setitem(BACKENDS, name, spy(name))
    held = torch.zeros(2, 128, 1, 32, dtype=torch.float16)[:, :100]
    for tokens in (1, 17):
        attention(held.new_zeros(2, tokens, 4, 32), held, held, Geometry())
    with attention_backend("triton"):
        attention(held.new_zeros(2, 1, 4, 32), held, held, Geometry())
    assert used == ["decode", "triton", "triton"]


def test_forced_for_what_it_does_not_take() -> None:
    held, q = torch.zeros(2, 128, 1, 32, dtype=torch.float16)[:, :100], torch.zeros(2, 1, 4, 32, dtype=torch.float16)
    wide = torch.zeros(2, 128, 1, 32, dtype=torch.float64)[:, :100]
    refused: list[tuple[str, Tensor, Tensor, Geometry]] = [
        ("whole pages", q, held.clone(), Geometry()),
        ("no gradient", q.clone().requires_grad_(), held, Geometry()),
        ("1 to 16 new tokens", q.expand(2, 17, 4, 32), held, Geometry()),
        ("one document", q, held, Geometry(starts=torch.zeros(2, 100, dtype=torch.int64))),
        ("of one type", q.double(), wide, Geometry()),
    ]
    for message, queries, keys, geometry in refused:
        with pytest.raises(ValueError, match=message), attention_backend("decode"):
            attention(queries, keys, keys, geometry)


def test_a_cached_step_compiles_without_graph_breaks() -> None:
    """Storage cannot be traced, so a compiled step takes what the others take."""
    q, buffer, geometry = torch.randn(2, 1, 4, 32), torch.randn(2, 128, 1, 32), Geometry()
    compiled = torch.compile(
        lambda q, buffer: attention(q, buffer[:, :100], buffer[:, :100], geometry), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(q, buffer), attention(q, buffer[:, :100], buffer[:, :100], geometry))
