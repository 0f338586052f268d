"""Paged attention without Triton against the plain reference; what no row holds is NaN, in memory and in pages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from andromeda.kernels import Geometry, PageLayout, gathered, paged_attention
from andromeda.kernels.gathered import gathered_attention
from tests.kernels.paged_batches import (
    CASES,
    NO_LIMIT,
    Batch,
    Case,
    assert_equal,
    assert_strides_do_not_matter,
    batch_of,
)
from tests.quick import quick

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 32 tokens and less, and groups of hardly more than a row."""
    for name, size in {"PIECE_BYTES": 8192, "ALONE_BYTES": 30000, "WASTED_BYTES": 2000}.items():
        monkeypatch.setattr(gathered, name, size)


def attend(batch: Batch, geometry: Geometry, layout: PageLayout | None = None) -> Tensor:
    layout = layout or PageLayout(batch.page_table, batch.lengths, batch.k_pages.shape[1])
    with torch.inference_mode():
        return gathered_attention(batch.q, batch.k_pages, batch.v_pages, layout, geometry)


LENGTHS = [[97, 5, 130, 0, 1], [150, 150]]


class TestEqualsTheReference:
    @pytest.mark.parametrize("lengths", quick(LENGTHS, LENGTHS[:1]))  # like ones in pieces
    @pytest.mark.parametrize("new", [1, 16])
    @pytest.mark.parametrize("name", CASES)
    def test_at_once(self, name: str, new: int, lengths: list[int]) -> None:
        batch, geometry = batch_of(lengths, new, CASES[name], torch.float32), CASES[name].with_rotary(32)
        assert_equal(attend(batch, geometry), batch, geometry)

    @pytest.mark.usefixtures("small_pieces")
    @pytest.mark.parametrize("lengths", LENGTHS)
    @pytest.mark.parametrize("new", [1, 16])
    @pytest.mark.parametrize("name", CASES)
    def test_in_pieces(self, name: str, new: int, lengths: list[int]) -> None:
        batch, geometry = batch_of(lengths, new, CASES[name], torch.float32), CASES[name].with_rotary(32)
        assert_equal(attend(batch, geometry), batch, geometry)

    @pytest.mark.usefixtures("small_pieces")
    @pytest.mark.parametrize("name", ["default", "multi_head", "grouped_across_the_sets", "no_windows"])
    def test_pages_in_runs(self, name: str) -> None:
        batch, geometry = batch_of([201, 330], 2, CASES[name], torch.float32, in_runs=True), CASES[name].with_rotary(32)
        assert_equal(attend(batch, geometry), batch, geometry)

    @pytest.mark.parametrize("in_pieces", [False, True])
    @settings(max_examples=25)
    @given(data=st.data())
    def test_any_batch(self, in_pieces: bool, data: st.DataObject) -> None:
        heads, kv_heads = data.draw(st.sampled_from([(1, 1), (3, 1), (4, 2), (3, 3), (6, 2)]))
        case = Case(
            heads=heads,
            kv_heads=kv_heads,
            rotated_heads=data.draw(st.integers(0, heads)),
            alibi_heads=data.draw(st.integers(0, heads)),
            xpos_scale=data.draw(st.sampled_from([None, 0.3, 5.0, 512.0])),
            interpolation=data.draw(st.sampled_from([0.5, 8.0])),
            bound=data.draw(st.sampled_from([None, 5.7, 50.0])),
        )
        windows = [data.draw(st.one_of(st.integers(1, 80), st.just(NO_LIMIT))) for _ in range(heads)]
        geometry = replace(case.with_rotary(32), windows=torch.tensor(windows))
        lengths = data.draw(st.lists(st.integers(0, 150), min_size=1, max_size=5).filter(any))
        in_runs, page_size = data.draw(st.booleans()), data.draw(st.sampled_from([16, 64]))
        new = data.draw(st.integers(1, 16))
        batch = batch_of(lengths, new, case, torch.float32, page_size=page_size, in_runs=in_runs)
        with pytest.MonkeyPatch.context() as patch:
            if in_pieces:
                patch.setattr(gathered, "PIECE_BYTES", data.draw(st.sampled_from([1, 10000])))
                patch.setattr(gathered, "ALONE_BYTES", data.draw(st.sampled_from([1, 20000])))
                patch.setattr(gathered, "WASTED_BYTES", data.draw(st.sampled_from([0, 5000])))
            assert_equal(attend(batch, geometry), batch, geometry)

    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 1.6e-2), (torch.float16, 2e-3)]
    )
    def test_other_types(self, dtype: torch.dtype, tolerance: float) -> None:
        """Half types lose no more than the rounding of what goes in and comes out."""
        case = CASES["default"]
        batch, geometry = batch_of([97, 5, 130], 2, case, dtype), case.with_rotary(32)
        assert_equal(attend(batch, geometry), batch, geometry, tolerance)

    def test_far_from_the_start(self) -> None:
        """Decay over 40,000 tokens underflows, and leaves what is near as it is."""
        case = Case(windowed=False, rotated_heads=4, xpos_scale=20.0)
        batch, geometry = batch_of([40_000, 39_990], 2, case, torch.float32, page_size=64), case.with_rotary(32)
        assert_equal(attend(batch, geometry), batch, geometry)

    def test_a_logit_beyond_what_goes_without_a_running_maximum(self) -> None:
        case = CASES["bounded"]
        batch = batch_of([150], 1, case, torch.float32)
        batch, geometry = batch._replace(q=90 * batch.q), case.with_rotary(32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gathered, "PIECE_BYTES", 1)
            assert not attend(batch, geometry).isfinite().all()
            geometry = replace(geometry, bounds=torch.tensor([520.0, 520.0, 520.0, 520.0]))
            assert_equal(attend(batch, geometry), batch, geometry, tolerance=3e-5)


class TestWhatIsRead:
    def test_keys_before_every_window_are_not_used(self) -> None:
        case = Case(alibi_heads=4)
        batch, geometry = batch_of([330, 300], 1, case, torch.float32), case.with_rotary(32)
        expected = attend(batch, geometry)
        for row, length in enumerate(batch.lengths.tolist()):
            j = torch.arange(length - 70 - 16 - 30)  # the longest window, a page's rest, and how lengths differ
            batch.k_pages[batch.page_table[row, j // 16].long(), j % 16] = torch.nan
            batch.v_pages[batch.page_table[row, j // 16].long(), j % 16] = torch.nan
        assert torch.equal(attend(batch, geometry), expected)

    def test_inputs_need_not_be_contiguous_and_are_left_alone(self) -> None:
        assert_strides_do_not_matter(attend)

    def test_a_layout_serves_many_blocks(self) -> None:
        case = CASES["default"]
        batches = [batch_of([97, 5, 130], 2, case, torch.float32) for _ in range(2)]
        batches[1] = batches[1]._replace(k_pages=2 * batches[1].k_pages, page_table=batches[0].page_table)
        layout = PageLayout(batches[0].page_table, batches[0].lengths, 16)
        for batch, windows in zip(batches, ([11, 70], [40, 20]), strict=True):
            geometry = replace(case.with_rotary(32), windows=torch.tensor([*windows, NO_LIMIT, NO_LIMIT]))
            assert_equal(attend(batch, geometry, layout=layout), batch, geometry)

    def test_lengths_from_the_host(self) -> None:
        case = CASES["default"]
        batch, geometry = batch_of([97, 5, 130], 2, case, torch.float32), case.with_rotary(32)
        with torch.inference_mode():
            assert torch.equal(paged_attention(*batch[:4], [97, 5, 130], geometry), paged_attention(*batch, geometry))


class TestGroups:
    def groups(self, lengths: list[int], token_bytes: int) -> list[list[int]]:
        layout = PageLayout(torch.zeros(len(lengths), 1), lengths, 64)
        return [group.lengths for group in layout.groups(token_bytes).groups]

    def test_rows_of_like_length_go_together(self) -> None:
        assert self.groups([5, 1000, 0, 990, 7], 512) == [[1000, 990], [7, 5]]

    def test_one_group_keeps_the_order(self) -> None:
        assert self.groups([5, 7, 6], 512) == [[5, 7, 6]]

    def test_what_is_wasted_adds_up(self) -> None:
        assert self.groups([1000, 900, 700, 500], 512) == [[1000, 900, 700], [500]]

    def test_a_long_row_stands_alone(self) -> None:
        assert self.groups([3000, 3000, 100], 1024) == [[3000], [3000], [100]]


@pytest.mark.parametrize(
    ("new", "changes", "message"),
    [
        (17, {}, "1 to 16 new tokens a row"),
        (1, {"v_pages": torch.zeros(16, 16, 1, 32, dtype=torch.float64)}, "of their type"),
        (1, {"page_table": torch.zeros(1, 3, dtype=torch.int64)}, "must be int32"),
    ],
)
def test_what_does_not_fit(new: int, changes: dict[str, Tensor], message: str) -> None:
    batch = batch_of([255], new, CASES["default"], torch.float32, spare=0)._replace(**changes)
    with pytest.raises(ValueError, match=message):
        paged_attention(*batch, CASES["default"].with_rotary(32))


def test_no_gradient() -> None:
    batch = batch_of([40], 1, CASES["default"], torch.float32)
    with pytest.raises(ValueError, match="no gradient"):
        paged_attention(batch.q.requires_grad_(), *batch[1:], CASES["default"].with_rotary(32))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1.6e-2)])
def test_on_a_gpu(dtype: torch.dtype, tolerance: float) -> None:
    """By the decode kernel where it takes the type, else by batches there."""
    case = CASES["bounded"]
    batch, geometry = batch_of([97, 5, 130], 2, case, dtype, device="cuda"), case.with_rotary(32, "cuda")
    assert_equal(attend(batch, geometry), batch, geometry, tolerance)
