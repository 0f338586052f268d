"""The C++ attention against the plain reference; what no row holds is NaN, in memory and in pages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from andromeda.kernels import Geometry, PageLayout, dispatch, paged_attention
from andromeda.kernels.cpu.attention import cpu_attention, takes
from andromeda.kernels.cpu.library import without_library
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
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def attend(batch: Batch, geometry: Geometry) -> Tensor:
    layout = PageLayout(batch.page_table, batch.lengths, batch.k_pages.shape[1])
    return cpu_attention(batch.q, batch.k_pages, batch.v_pages, layout, geometry)


ONE, UNLIKE, MANY = [1500], [1200, 30], [150, 140, 160, 130, 150, 150, 150, 190]
SHARED = [(name, lengths) for name in ("default", "multi_head", "no_windows") for lengths in (ONE, UNLIKE, MANY)]


class TestEqualsTheReference:
    @pytest.mark.parametrize("lengths", [[97, 5, 130, 0, 1], [63, 64, 65, 128, 129, 16, 17]])
    @pytest.mark.parametrize(
        ("name", "new"), [(name, new) for name in CASES for new in (1, 2, 16) if (name, new) != ("steep_xpos", 16)]
    )  # which it does not take
    def test_all_flags(self, name: str, new: int, lengths: list[int]) -> None:
        batch, geometry = batch_of(lengths, new, CASES[name], torch.float32), CASES[name].with_rotary(32)
        assert_equal(attend(batch, geometry), batch, geometry)

    @pytest.mark.parametrize("dim_head", [8, 16, 24, 128])
    def test_widths_of_heads(self, dim_head: int) -> None:
        case = CASES["grouped_across_the_sets"]
        batch, geometry = batch_of([97, 5, 130], 2, case, torch.float32, dim_head), case.with_rotary(dim_head)
        assert_equal(attend(batch, geometry), batch, geometry)

    @settings(max_examples=60)
    @given(data=st.data())
    def test_any_batch(self, data: st.DataObject) -> None:
        heads, kv_heads = data.draw(st.sampled_from([(1, 1), (3, 1), (4, 2), (3, 3), (6, 2), (8, 1)]))
        case = Case(
            heads=heads,
            kv_heads=kv_heads,
            rotated_heads=data.draw(st.integers(0, heads)),
            alibi_heads=data.draw(st.integers(0, heads)),
            xpos_scale=data.draw(st.sampled_from([None, 3.0, 512.0])),
            interpolation=data.draw(st.sampled_from([0.9, 8.0])),
        )
        windows = [data.draw(st.one_of(st.integers(1, 200), st.just(NO_LIMIT))) for _ in range(heads)]
        geometry = replace(case.with_rotary(32), windows=torch.tensor(windows))
        lengths = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=5).filter(any))
        new, page_size = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([16, 64]))
        batch = batch_of(lengths, new, case, torch.float32, page_size=page_size)
        assert_equal(attend(batch, geometry), batch, geometry)

    @pytest.mark.usefixtures("two_threads")
    @pytest.mark.parametrize(
        "shared", quick(SHARED, [("default", ONE), ("multi_head", MANY), ("no_windows", UNLIKE)]), ids=str
    )
    def test_threads(self, shared: tuple[str, list[int]]) -> None:
        """One text is shared out among them, or each has texts of its own."""
        name, lengths = shared
        case = replace(CASES[name], xpos_scale=512.0)
        batch, geometry = batch_of(lengths, 2, case, torch.float32, 128, 64), case.with_rotary(128)
        assert_equal(attend(batch, geometry), batch, geometry)

    def test_far_from_the_start(self) -> None:
        """Decay over 40,000 tokens underflows, and leaves what is near as it is."""
        case = Case(windowed=False, rotated_heads=4, xpos_scale=20.0)
        batch, geometry = batch_of([40_000, 39_990], 2, case, torch.float32, page_size=64), case.with_rotary(32)
        assert_equal(attend(batch, geometry), batch, geometry)

    @pytest.mark.parametrize("factor", [30.0, 1000.0])
    def test_large_logits(self, factor: float) -> None:
        case = CASES["no_windows"]
        batch = batch_of([150, 70], 2, case, torch.float32)
        batch, geometry = batch._replace(q=factor * batch.q), case.with_rotary(32)
        assert_equal(attend(batch, geometry), batch, geometry, tolerance=1e-6 * factor)


class TestWhatIsRead:
    def test_keys_before_every_window_are_not_used(self) -> None:
        case = Case(alibi_heads=4)
        batch, geometry = batch_of([330, 300], 2, case, torch.float32), case.with_rotary(32)
        expected = attend(batch, geometry)
        for row, length in enumerate(batch.lengths.tolist()):
            j = torch.arange(length - 1 - 70)  # the longest window, from the token before the last
            batch.k_pages[batch.page_table[row, j // 16].long(), j % 16] = torch.nan
            batch.v_pages[batch.page_table[row, j // 16].long(), j % 16] = torch.nan
        assert torch.equal(attend(batch, geometry), expected)

    def test_a_key_that_is_no_number_shows_where_it_is_seen(self) -> None:
        case = Case(alibi_heads=4)
        batch, geometry = batch_of([330, 300], 1, case, torch.float32), case.with_rotary(32)
        batch.k_pages[batch.page_table[0, (330 - 20) // 16].long(), (330 - 20) % 16] = torch.nan
        seen = [window >= 20 for window in (11, 70, 35, 50)]
        assert attend(batch, geometry)[:, 0].isnan().any(-1).tolist() == [seen, [False] * 4]

    def test_inputs_need_not_be_contiguous_and_are_left_alone(self) -> None:
        assert_strides_do_not_matter(attend)


def test_it_is_taken_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    case, calls = CASES["default"], list[Tensor]()

    def watched(q: Tensor, *others: Any) -> Tensor:
        calls.append(q)
        return cpu_attention(q, *others)

    monkeypatch.setattr(dispatch, "cpu_attention", watched)
    batch, geometry = batch_of([97, 5, 130], 2, case, torch.float32), case.with_rotary(32)
    double = batch.to(torch.float64)
    assert_equal(paged_attention(*batch, geometry), batch, geometry)
    assert len(calls) == 1
    with without_library():
        assert_equal(paged_attention(*batch, geometry), batch, geometry)
    assert_equal(paged_attention(*double, geometry), double, geometry)
    assert len(calls) == 1
    steep = CASES["steep_xpos"].with_rotary(32)
    assert takes(torch.float32, torch.device("cpu"), 32, 2, steep.rotary)
    assert not takes(torch.float32, torch.device("cpu"), 32, 16, steep.rotary)
    assert not takes(torch.float32, torch.device("cpu"), 20, 1, None)
